"""From batches with absent tokens, or sequences packed into one row, to rows that begin at 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from testtime.ops.ttt.grid import packed


@dataclass(frozen=True)
class Rows:
    """Which token of a batch [B, T] is where in rows [N, L] whose real tokens come first.

    Args:
        lengths: real tokens of each row, int64 [N].
        there: for each place of the rows the token, int64 [N, L]; B T where there is none.
        back: for each token its place in the rows, int64 [B, T]; N L where it is absent.
    """

    lengths: Tensor
    there: Tensor
    back: Tensor

    @classmethod
    def masked(cls, mask: Tensor) -> "Rows":
        """Return the rows without the tokens whose mask [B, T] is 0, wherever they are."""
        real = mask.bool()
        batch, length = real.shape
        place = (
            real.long().cumsum(1) - 1 + length * torch.arange(batch, device=real.device)[:, None]
        )
        back = torch.where(real, place, batch * length)
        tokens = torch.arange(batch * length, device=real.device).view(batch, length)
        there = torch.full((batch * length + 1,), batch * length, device=real.device)
        there = there.scatter(0, back.flatten(), tokens.flatten())[:-1].view(batch, length)
        return cls(real.sum(1), there, back)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, length: int) -> "Rows":
        """Return a row for each of the sequences between these boundaries [N + 1]."""
        there, lengths, back = packed(cu_seqlens, length)
        return cls(lengths, there, back[None])

    def pack(self, x: Tensor) -> Tensor:
        """From [B, T, ...] to rows [N, L, ...], with zeros where there is no token."""
        return _pick(x, self.there)

    def unpack(self, y: Tensor) -> Tensor:
        """From rows [N, L, ...] to [B, T, ...], with zeros for absent tokens."""
        return _pick(y, self.back)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    return torch.cat((flat, flat.new_zeros(1, *flat.shape[1:])))[index]


def last_columns(mask: Tensor, batch: int, length: int) -> Tensor:
    """Return the part of an attention mask that is about the tokens at hand, [B, T].

    Raises:
        ValueError: it is not [B, T], nor longer because it is about earlier tokens as well.
    """
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must be [batch, length] with 0 for absent tokens, here [{batch}, "
            f"{length}] or longer at the front by the tokens of earlier calls; found "
            f"{list(mask.shape)}. A causal mask of four axes is not needed: the layer is causal."
        )
    return mask[:, mask.shape[1] - length :]
