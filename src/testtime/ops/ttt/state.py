"""The law of state for a layer that learns as it reads: all that moves is one value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from testtime.ops.ttt.affine import sums


@dataclass(frozen=True)
class Chunk:
    """Tokens of one chunk with the parameters that it starts from; unfilled places hold zeros.

    Args:
        start: the parameters, [B, H, ...]: (W, b), or (W1, b1, W2, b2).
        inputs: of each layer, [B, H, K, .]; the first are the keys.
        gradients: of each token's loss at the output of each layer, [B, H, K, .].
        v: values, [B, H, K, D].
        lr: inner learning rates, [B, H, K, 1].
    """

    start: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    v: Tensor
    lr: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by a name such as ``start.0``."""
        found = {"v": self.v, "lr": self.lr}
        for group in ("start", "inputs", "gradients"):
            found |= {f"{group}.{i}": t for i, t in enumerate(getattr(self, group))}
        return found

    def map(self, change: Callable[..., Tensor], *others: "Chunk", start: bool = True) -> "Chunk":
        """Return the chunk whose every tensor is a function of those of this and other chunks.

        Args:
            change: the function.
            others: chunks whose tensors are its further arguments.
            start: false leaves the parameters as they are, and changes tokens only.
        """
        chunks = (self, *others)

        def group(name: str) -> tuple[Tensor, ...]:
            columns = zip(*(getattr(c, name) for c in chunks), strict=True)
            return tuple(change(*column) for column in columns)

        return Chunk(
            start=group("start") if start else self.start,
            inputs=group("inputs"),
            gradients=group("gradients"),
            v=change(*(c.v for c in chunks)),
            lr=change(*(c.lr for c in chunks)),
        )

    def first(self, tokens: Tensor) -> "Chunk":
        """Return the chunk with its first tokens only, [B] of them; the start stays."""
        places = torch.arange(self.lr.shape[2], device=tokens.device)
        keep = (places < tokens[:, None])[:, None, :, None]
        return self.map(lambda t: torch.where(keep, t, 0), start=False)

    def where(self, rows: Tensor, other: "Chunk") -> "Chunk":
        """Return this chunk in the rows [B] that are true, the other elsewhere."""
        return self.map(lambda a, b: torch.where(rows.view(-1, 1, 1, 1), a, b), other)


@dataclass(frozen=True)
class State:
    """Where a layer stands after any token; a value, which no later call changes.

    Everything is per row of the batch, so rows may stand at different positions. All of it may
    carry gradients: a loss on what follows reaches what came before.

    Args:
        now: the unfinished chunk.
        position: tokens seen, int64 [B].
        coefficient: by position in the chunk, [K].
        past: finished chunks, newest first, for rolling back; without gradients.
        remembered: how many tokens can be rolled back, int64 [B].
    """

    now: Chunk
    position: Tensor
    coefficient: Tensor
    past: tuple[Chunk, ...]
    remembered: Tensor

    @property
    def chunk(self) -> int:
        """Return the length K of a chunk."""
        return len(self.coefficient)

    @property
    def filled(self) -> Tensor:
        """Return how many tokens the unfinished chunk has, int64 [B], less than K."""
        return self.position % self.chunk

    def sums(self) -> tuple[Tensor, ...]:
        """Return the sums A of lr times gradient over the unfinished chunk, shaped as the start.

        Without position coefficients: the authors' cache holds the start and these.
        """
        now = self.now
        found: list[Tensor] = []
        for x, g in zip(now.inputs, now.gradients, strict=True):
            found += sums(x.to(g.dtype), g, now.lr, g.dtype)
        return tuple(found)

    def read(self) -> tuple[Tensor, ...]:
        """Return the parameters that the last token read, start - c_r A.

        They are for looking at: going on from them is another method, unless a chunk just ended.
        """
        last = (self.filled - 1).clamp(min=0)
        c = self.coefficient.to(self.now.lr.dtype)[last].view(-1, 1, 1, 1)
        return tuple(p - c * a for p, a in zip(self.now.start, self.sums(), strict=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> "State":
        """Return a state with every tensor that has rows changed."""
        return replace(
            self,
            now=self.now.map(change),
            position=change(self.position),
            past=tuple(one.map(change) for one in self.past),
            remembered=change(self.remembered),
        )

    def rows(self, index: Tensor) -> "State":
        """Return the state of these rows, in this order; a row may come several times (beams)."""
        return self.map(lambda t: t.index_select(0, index.to(t.device)))

    def detach(self) -> "State":
        """Return the state without its history of gradients."""
        return replace(self.map(Tensor.detach), coefficient=self.coefficient.detach())

    def to(self, device: torch.device | str) -> "State":
        """Return the state on a device."""
        return replace(self.map(lambda t: t.to(device)), coefficient=self.coefficient.to(device))

    def remembering(self, tokens: int) -> "State":
        """Return a state that remembers so many of the tokens to come, if it were fewer."""
        more = -(-tokens // self.chunk) - len(self.past)
        blank = self.now.map(lambda t: torch.zeros_like(t.detach()))
        return replace(self, past=(*self.past, *(blank,) * more))

    def roll_back(self, tokens: int | Tensor) -> "State":
        """Return the state as it was before the last tokens, to the bit.

        Args:
            tokens: how many, for all rows or [B].

        Raises:
            ValueError: further back than the state remembers, or the state carries gradients.
        """
        back = torch.as_tensor(tokens, device=self.position.device).expand_as(self.position)
        if bool((back < 0).any()) or bool((back > self.remembered).any()):
            raise ValueError(
                f"The state cannot be rolled back by {back.tolist()} tokens: it remembers "
                f"{self.remembered.tolist()}. Ask for more with remember= when it is made."
            )
        if any(t.requires_grad for t in self.now.tensors().values()):
            raise ValueError(
                "A state that carries gradients cannot be rolled back, for what it remembers "
                "carries none. Roll back state.detach()."
            )
        position = self.position - back
        # Row by row, so many chunks ago.
        ago = self.position // self.chunk - position // self.chunk
        chunks = [self.now, *self.past]
        shifted = []
        for place in range(len(chunks)):
            chosen = chunks[place]
            for far in range(1, len(chunks) - place):
                chosen = chunks[place + far].where(ago == far, chosen)
            shifted.append(chosen)
        now = shifted[0].first(position % self.chunk)
        return replace(
            self,
            now=now,
            position=position,
            past=tuple(shifted[1:]),
            remembered=self.remembered - back,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, as ``State.load`` and safetensors take them."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _CHUNKS}
        for place, one in enumerate((self.now, *self.past)):
            found |= {f"chunk.{place}.{name}": t for name, t in one.tensors().items()}
        return {name: tensor.detach().contiguous() for name, tensor in found.items()}

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor]) -> "State":
        """Return the state that ``tensors()`` was taken of.

        Raises:
            ValueError: something is missing.
        """
        try:
            chunks: list[Chunk] = []
            while f"chunk.{len(chunks)}.lr" in tensors:
                place = f"chunk.{len(chunks)}"
                names = ("start", "inputs", "gradients")
                groups = {name: _numbered(tensors, f"{place}.{name}.") for name in names}
                chunks.append(Chunk(**groups, v=tensors[f"{place}.v"], lr=tensors[f"{place}.lr"]))
            rest = {f.name: tensors[f.name] for f in fields(cls) if f.name not in _CHUNKS}
            return cls(now=chunks[0], past=tuple(chunks[1:]), **rest)
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"These are not the tensors of a state ({error} is missing): found "
                f"{', '.join(sorted(tensors)) or 'none'}. Give what State.tensors() returned."
            ) from None


_CHUNKS = ("now", "past")


def _numbered(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, ...]:
    return tuple(tensors[f"{prefix}{i}"] for i in range(sum(n.startswith(prefix) for n in tensors)))
