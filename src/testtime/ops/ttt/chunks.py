"""The loop over chunks, forward and backward, for any inner model.

Inside, tensors are chunk by chunk: ``[n, N, K, D]`` with n chunks and N = B H sequences of one
head, so that what does not wait for the chunk before runs on many chunks at once. ``lr`` and
``rate`` are ``[n, N, K, 1]``, ``steps`` is ``[n, N, K, K]``.
"""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from testtime.ops.ttt.affine import add_product

S = TypeVar("S", covariant=True)


class Tokens(NamedTuple):
    """Tokens on the chunk grid."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor


class Tracked(NamedTuple, Generic[S]):
    """What tokens teach: for each layer its inputs and the gradients at its output, [..., K, .]."""

    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    loss: Tensor
    saved: S


class Cotangents(NamedTuple):
    """Cotangents of what goes into a group of chunks; of the norm's, token by token."""

    q: Tensor
    k: Tensor
    v: Tensor
    steps: Tensor
    rate: Tensor
    weight: Tensor
    bias: Tensor


class Inner(Protocol):
    """An inner model: what it learns from a chunk, what it answers, and the way back."""

    operand: torch.dtype

    def learn(self, start: Sequence[Tensor], k: Tensor, v: Tensor) -> Tracked[Any]:
        """Return what tokens teach at parameters ``start``."""

    def answer(
        self,
        start: Sequence[Tensor],
        q: Tensor,
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        steps: Tensor,
    ) -> Tensor:
        """Return the outputs of tokens that read ``start`` moved by ``steps`` of the gradients."""

    def backward(
        self,
        start: Sequence[Tensor],
        learned: Tracked[Any],
        tokens: Tokens,
        steps: Tensor,
        rate: Tensor,
        d_o: Tensor,
        d_state: Sequence[Tensor],
    ) -> Cotangents:
        """Return the cotangents of a group of g chunks.

        ``start`` are the parameters at each chunk's start, ``[g, ...]``, ``learned`` is what the
        chunks teach there; ``d_state`` are the cotangents of the parameters, ``[g + 1, ...]``: the
        last is given, the others are written here.
        """


# Chunks that are worked on at once where nothing else says how many.
GROUP = 16


def stack(trees: Sequence[Any]) -> Any:
    """Return the tuple, of tuples, of tensors that stacks those of a sequence."""
    if isinstance(trees[0], Tensor):
        return torch.stack(list(trees))
    parts = [stack(column) for column in zip(*trees, strict=True)]
    kind = type(trees[0])
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


class Grid:
    """The chunks of one call: which of them close, and with what steps.

    Args:
        lr: inner learning rates, [n, N, K, 1].
        coefficient: by position in the chunk, [K].
        closed: how many chunks each of the N rows has to the end; later ones move no state.
    """

    def __init__(self, lr: Tensor, coefficient: Tensor, closed: Tensor) -> None:
        self.lr, self.coefficient, self.closed = lr, coefficient, closed
        self.lowest, self.highest = int(closed.min()), int(closed.max())

    def steps(self, chunks: slice) -> Tensor:
        """Return the step of token j that token i reads, c_i lr_j for j <= i."""
        return (self.coefficient[:, None] * self.lr[chunks].mT).tril()

    def closes(self, chunks: slice) -> Tensor:
        """Return where a row closes a chunk, [chunks, N, 1, 1]."""
        numbers = torch.arange(chunks.start, chunks.stop, device=self.closed.device)
        return (numbers[:, None] < self.closed)[:, :, None, None]

    def rate(self, chunks: slice) -> Tensor:
        """Return the step of each token in the state that the next chunk starts from."""
        return self.coefficient[-1] * self.lr[chunks] * self.closes(chunks)


def walk(
    inner: Inner, tokens: Tokens, grid: Grid, chunks: slice, start: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tracked[Any]]]:
    """Return the parameters at every chunk's start and after the last, and what was learned."""
    count = chunks.stop - chunks.start
    states = [p.new_empty(count + 1, *p.shape) for p in start]
    for whole, first in zip(states, start, strict=True):
        whole[0] = first
    learned, rate = [], grid.coefficient[-1] * tokens.lr[chunks]
    for i, j in enumerate(range(chunks.start, chunks.stop)):
        here = inner.learn([p[i] for p in states], tokens.k[j], tokens.v[j])
        learned.append(here)
        if j >= grid.highest:
            for p in states:
                p[i + 1] = p[i]
            continue
        for layer, (x, g) in enumerate(zip(here.inputs, here.gradients, strict=True)):
            w, b = states[2 * layer : 2 * layer + 2]
            step = rate[i] * g
            add_product(w[i], x.mT, -step, inner.operand, out=w[i + 1])
            torch.sub(b[i], step.sum(-2, keepdim=True), out=b[i + 1])
            for p in (w, b):
                if j >= grid.lowest:
                    # Not a rate of 0: what an unfinished chunk holds may not be finite.
                    torch.where(grid.closes(slice(j, j + 1))[0], p[i + 1], p[i], out=p[i + 1])
    return states, learned


def groups(count: int, size: int) -> list[slice]:
    """Return the groups of chunks, in order."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


class Forward(NamedTuple):
    """What a forward over all chunks gives."""

    o: Tensor
    end: list[Tensor]
    checkpoints: list[Tensor]  # the parameters at the start of groups or chunks, [., N, ...]
    past: list[Tensor]  # at the start of each row's last closed chunks, newest first, [past, N, ..]
    losses: list[Tensor]  # before and after each token's step, where asked for


def forward(
    inner: Inner,
    tokens: Tokens,
    grid: Grid,
    start: Sequence[Tensor],
    *,
    size: int,
    past: int = 0,
    keep: bool = False,
    losses: bool = False,
) -> Forward:
    """Run all chunks.

    Args:
        inner: the inner model.
        tokens: of all chunks.
        grid: their steps.
        start: parameters, [N, ...].
        size: chunks of a group; 1: groups as below, and every chunk's start is a checkpoint.
        past: how many closed chunks to return the start of.
        keep: return checkpoints.
        losses: return the inner losses.
    """
    outputs, before, after = [], [], []
    every, size = size == 1, GROUP if size == 1 else size
    checkpoints: list[list[Tensor]] = [[] for _ in start]
    recent = [p.new_zeros(past, *p.shape) for p in start]
    now = list(start)
    for chunks in groups(len(tokens.q), size):
        states, learned = walk(inner, tokens, grid, chunks, now)
        for saved, p in zip(checkpoints, states, strict=True):
            saved += [p[:-1] if every else p[:1]] * keep
        inputs, gradients = stack([(one.inputs, one.gradients) for one in learned])
        starts, steps = [p[:-1] for p in states], grid.steps(chunks)
        outputs.append(inner.answer(starts, tokens.q[chunks], inputs, gradients, steps))
        if losses:
            before.append(torch.stack([one.loss for one in learned]))
            # A token that asks with its own key is answered k + f(k), and v is what it should be.
            own = inner.answer(starts, tokens.k[chunks], inputs, gradients, steps)
            after.append((own - tokens.v[chunks]).square().sum(-1) / 2)
        for back in range(past):
            for i, j in enumerate(range(chunks.start, chunks.stop)):
                if grid.lowest - 1 - back <= j <= grid.highest - 1 - back:
                    here = (grid.closed - 1 - back == j)[:, None, None]
                    for kept, p in zip(recent, states, strict=True):
                        kept[back] = torch.where(here, p[i], kept[back])
        now = [p[-1] for p in states]
    return Forward(
        torch.cat(outputs),
        now,
        [torch.cat(p) if p else start[0].new_empty(0) for p in checkpoints],
        recent,
        [torch.cat(before), torch.cat(after)] if losses else [],
    )


class Backward(NamedTuple):
    """The cotangents of everything that goes into a forward; of the norm's, token by token."""

    tokens: Tokens
    coefficient: Tensor
    weight: Tensor
    bias: Tensor
    start: list[Tensor]


def backward(
    inner: Inner,
    tokens: Tokens,
    grid: Grid,
    checkpoints: Sequence[Tensor],
    d_o: Tensor,
    d_end: Sequence[Tensor],
    *,
    size: int,
) -> Backward:
    """Go through all chunks from the end, group by group.

    Args:
        inner: the inner model.
        tokens: of all chunks.
        grid: their steps.
        checkpoints: as ``forward`` returned them.
        d_o: cotangent of the outputs.
        d_end: cotangents of the parameters after the last chunk.
        size: as given to ``forward``.
    """
    every, size = size == 1, GROUP if size == 1 else size
    d_tokens = Tokens(*(torch.empty_like(t) for t in tokens))
    d_coefficient = torch.zeros_like(grid.coefficient)
    d_weight, d_bias = torch.empty_like(d_o), torch.empty_like(d_o)
    d_now = list(d_end)
    for number, chunks in reversed(list(enumerate(groups(len(tokens.q), size)))):
        here = Tokens(*(t[chunks] for t in tokens))
        if every:
            starts = [p[chunks] for p in checkpoints]
            learned = inner.learn(starts, here.k, here.v)
        else:
            states, found = walk(inner, tokens, grid, chunks, [p[number] for p in checkpoints])
            starts, learned = [p[:-1] for p in states], stack(found)
        d_state = [p.new_empty(chunks.stop - chunks.start + 1, *p.shape) for p in d_now]
        for whole, last in zip(d_state, d_now, strict=True):
            whole[-1] = last
        steps, rate = grid.steps(chunks), grid.rate(chunks)
        d = inner.backward(starts, learned, here, steps, rate, d_o[chunks], d_state)
        d_tokens.q[chunks], d_tokens.k[chunks], d_tokens.v[chunks] = d.q, d.k, d.v
        d_weight[chunks], d_bias[chunks] = d.weight, d.bias
        # steps_ij = c_i lr_j for j <= i, rate_j = c_K lr_j where the chunk closes
        d_steps, d_rate = d.steps.tril(), d.rate * grid.closes(chunks)
        d_lr = (d_steps * grid.coefficient[:, None]).sum(-2, keepdim=True).mT
        d_tokens.lr[chunks] = d_lr + grid.coefficient[-1] * d_rate
        d_coefficient += (d_steps @ here.lr).sum((0, 1))[:, 0]
        d_coefficient[-1] += (d_rate * here.lr).sum()
        d_now = [p[0] for p in d_state]
    return Backward(d_tokens, d_coefficient, d_weight, d_bias, d_now)
