"""What one layer keeps between calls: the state of its inner model, and convolution inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testtime.ops.ttt.state import State


@dataclass
class LayerCache:
    """The state of a layer, which its calls read and replace; empty before the first.

    Args:
        remember: how many tokens can be rolled back at any time.
        state: of the inner model, for its rows.
        tails: the last inputs of each convolution by name, [B, time, C], the newest last.
    """

    remember: int = 0
    state: State | None = None
    tails: dict[str, Tensor] = field(default_factory=dict)

    def tail(
        self, name: str, x: Tensor, lengths: Tensor | None, conv: nn.Conv1d, chunk: int
    ) -> Tensor:
        """Return the inputs of a convolution before x [B, T, C], and keep the last ones with x.

        Args:
            name: of the convolution.
            x: its new inputs.
            lengths: how many of them are real in each row, [B]; none: all.
            conv: the convolution, for its kernel.
            chunk: of the layer, for what is rolled back is rounded up to chunks.
        """
        size = conv.kernel_size[0] - 1 + -(-self.remember // chunk) * chunk
        tail = self.tails.get(name)
        tail = x.new_zeros(len(x), size, x.shape[2]) if tail is None else tail
        tail = F.pad(tail.to(x.dtype), (0, 0, size - tail.shape[1], 0))
        inputs = torch.cat((tail, x), 1)
        if lengths is None:
            self.tails[name] = inputs[:, inputs.shape[1] - size :]
        else:
            index = lengths[:, None] + torch.arange(size, device=x.device)
            self.tails[name] = inputs.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        return tail

    def rows(self, index: Tensor) -> None:
        """Keep these rows in this order; one may come several times (beams)."""
        if self.state is not None:
            self.state = self.state.rows(index)
        self.tails = {n: t.index_select(0, index.to(t.device)) for n, t in self.tails.items()}

    def remembering(self, tokens: int) -> None:
        """Remember so many tokens from now on, if it were fewer."""
        self.remember = max(self.remember, tokens)
        if self.state is not None:
            self.state = self.state.remembering(self.remember)

    def detach(self) -> None:
        """Forget where gradients came from: the next loss does not reach earlier tokens."""
        if self.state is not None:
            self.state = self.state.detach()
        self.tails = {name: t.detach() for name, t in self.tails.items()}

    def roll_back(self, tokens: int | Tensor) -> None:
        """Take the last tokens back, so many of all rows or [B] of each.

        Raises:
            ValueError: further back than is remembered.
        """
        if self.state is None:
            if bool((torch.as_tensor(tokens) != 0).any()):
                raise ValueError("There is nothing to roll back: the cache has seen no token.")
            return
        self.state = self.state.roll_back(tokens)
        back = torch.as_tensor(tokens, device=self.state.position.device)
        back = back.expand_as(self.state.position)
        for name, tail in self.tails.items():
            place = torch.arange(tail.shape[1], device=tail.device) - back[:, None]
            moved = tail.gather(1, place.clamp(min=0)[..., None].expand_as(tail))
            self.tails[name] = torch.where(place[..., None] >= 0, moved, 0)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, for safetensors; ``load`` takes them."""
        found = {f"tail.{name}": t.detach().contiguous() for name, t in self.tails.items()}
        if self.state is not None:
            found |= {f"state.{name}": t for name, t in self.state.tensors().items()}
        return found

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], remember: int = 0) -> "LayerCache":
        """Return the cache that ``tensors()`` was taken of."""
        parts: dict[str, dict[str, Tensor]] = {"state": {}, "tail": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        state = State.load(parts["state"]) if parts["state"] else None
        return cls(remember, state, parts["tail"])
