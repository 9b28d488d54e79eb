"""One call of an operator: check, place on the grid, run the chunks, return outputs and state."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.ops.ttt.affine import sums
from testtime.ops.ttt.checks import check
from testtime.ops.ttt.chunks import Inner, Tokens
from testtime.ops.ttt.grid import from_rows, packed, source, take, to_rows
from testtime.ops.ttt.library import MakeInner, Operator, accumulation, rows_norm
from testtime.ops.ttt.state import Chunk, State

Form = Literal["auto", "chunked", "decode"]


class Output(NamedTuple):
    """What an operator returns.

    Args:
        o: outputs, [B, H, T, D]; zeros behind a row's length.
        state: after the last token.
        losses: [2, B, H, T], the inner loss of each token before and after its step; empty unless
            asked for, and without gradients.
        form: that ran, "chunked" or "decode".
    """

    o: Tensor
    state: State
    losses: Tensor
    form: str


@dataclass(frozen=True)
class Model:
    """An inner model and the operator that runs it."""

    make: MakeInner
    operator: Operator
    layers: int

    def inner(self, norm: tuple[Tensor, Tensor], options: "Options", like: Tensor) -> Inner:
        """Return the inner model for tokens [B H, K, D] of the batch and dtype of ``like``."""
        rows = rows_norm(*norm, options.eps, len(like), accumulation(like.dtype))
        return self.make(rows, like.dtype, options.official)


@dataclass(frozen=True)
class Options:
    """How an operator is asked to run; see ``ttt_linear``."""

    eps: float = 1e-6
    official: bool = False
    recompute: int = 16
    losses: bool = False


def begin(start: Sequence[Tensor], like: Tensor, coefficient: Tensor, remember: int = 0) -> State:
    """Return the state before the first token.

    Args:
        start: parameters, [H, ...] for all rows or [B, H, ...].
        like: tokens [B, H, T, D] of the sequences to come.
        coefficient: by position in the chunk, [K].
        remember: how many tokens can be rolled back later, rounded up to whole chunks.
    """
    dtype, heads, chunk = accumulation(like.dtype), like.shape[:2], len(coefficient)
    # A layer's inputs are as wide as its matrix is high, its gradients as its bias.
    (_, *high), wide = [p.shape[-2] for p in start[::2]], [p.shape[-1] for p in start[::2]]
    empty = like.new_zeros(*heads, chunk, like.shape[3])
    now = Chunk(
        start=tuple(p.to(dtype).expand(*heads, -1, -1) for p in start),
        inputs=(empty, *(like.new_zeros(*heads, chunk, size, dtype=dtype) for size in high)),
        gradients=tuple(like.new_zeros(*heads, chunk, size, dtype=dtype) for size in wide),
        v=empty,
        lr=like.new_zeros(*heads, chunk, 1, dtype=dtype),
    )
    nothing = torch.zeros(len(like), dtype=torch.int64, device=like.device)
    past = (now.map(Tensor.detach),) * -(-remember // chunk)
    return State(now, nothing, coefficient, past, nothing)


def run(
    model: Model,
    tokens: Tokens,
    coefficient: Tensor,
    norm: tuple[Tensor, Tensor],
    state: State | Sequence[Tensor],
    *,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    remember: int,
    form: Form,
    options: Options,
) -> Output:
    """Run an inner model over tokens [B, H, T, .]; the arguments are those of ``ttt_linear``."""
    check(
        model.layers,
        tokens,
        coefficient,
        norm,
        state,
        lengths,
        cu_seqlens,
        remember,
        form,
        options.recompute,
    )
    if cu_seqlens is not None:
        index, lengths, place = packed(cu_seqlens.to(tokens.q.device), tokens.q.shape[2])
        tokens = Tokens(*(to_rows(t, index) for t in tokens))
    if isinstance(state, State):
        fresh, state = False, replace(state, coefficient=coefficient)
    else:
        fresh, state = lengths is None, begin(state, tokens.q, coefficient, remember)
    needs = (*tokens, coefficient, *norm, *state.now.tensors().values())
    graded = torch.is_grad_enabled() and any(t.requires_grad for t in needs)
    if form == "auto":
        alone = tokens.q.shape[2] == 1 and not (graded or fresh or options.losses)
        form = "decode" if alone else "chunked"
    if form == "decode":
        found = _decode(model, tokens, norm, state, lengths, options)
    else:
        found = _chunked(model, tokens, norm, state, lengths, options, graded, fresh)
    if cu_seqlens is None:
        return found
    losses = from_rows(found.losses, place) if options.losses else found.losses
    return found._replace(o=from_rows(found.o[None], place)[0], losses=losses)


def _chunked(
    model: Model,
    tokens: Tokens,
    norm: tuple[Tensor, Tensor],
    state: State,
    lengths: Tensor | None,
    options: Options,
    graded: bool,
    fresh: bool,
) -> Output:
    chunk, count, filled, now = state.chunk, tokens.q.shape[2], state.filled, state.now
    lengths = torch.full_like(filled, count) if lengths is None else lengths.to(filled)
    old = Tokens(torch.zeros_like(now.v), now.inputs[0], now.v, now.lr)
    new = Tokens(*(t.to(o.dtype) for t, o in zip(tokens, old, strict=True)))

    def at(places: Tensor) -> Tokens:
        index = source(places, filled, lengths, chunk, count)
        return Tokens(*(take(pair, index) for pair in zip(old, new, strict=True)))

    # Rows that all begin a chunk need no more places than tokens; others may begin K - 1 later.
    size = -(-max(count + (0 if fresh else chunk - 1), 1) // chunk) * chunk
    places = torch.arange(size, device=filled.device)
    if fresh:
        grid = Tokens(*(F.pad(t, (0, 0, 0, size - count)) for t in new))
    else:
        grid = at(places.expand(len(filled), -1))
    closed = (filled + lengths) // chunk
    found = model.operator(
        *(grid.q, grid.k, grid.v, grid.lr[..., 0], state.coefficient, *norm, now.start, closed),
        *(options.eps, options.official, options.recompute, graded, len(state.past)),
        options.losses,
    )

    inner = model.inner(norm, options, tokens.q)

    def chunk_at(number: Tensor, start: Sequence[Tensor]) -> Chunk:
        inside = number[:, None] * chunk + torch.arange(chunk, device=number.device)
        return _learn(inner, start, at(inside.clamp(min=0)))

    past: list[Chunk] = []
    most = size // chunk  # chunks that a row may close in this call
    with torch.no_grad():
        for back, here in enumerate(state.past):
            if back < most:
                here = chunk_at(closed - 1 - back, [p[back] for p in found.past])
            # Where a row closed so few, an older one comes forward.
            for few in range(min(back, most) + 1):
                here = state.past[back - few].where(closed == few, here)
            past.append(here)
    last = chunk_at(closed, found.end).first((filled + lengths) % chunk)
    if fresh:
        o, losses = found.o[:, :, :count], found.losses[..., :count]
    else:
        real = torch.arange(count, device=filled.device)
        back_to = torch.where(real < lengths[:, None], filled[:, None] + real, size)
        o = take((found.o,), back_to)
        both = [take((one,), back_to) for one in found.losses]
        losses = torch.stack(both) if both else found.losses
    return Output(o, _advance(state, last, past, lengths), losses, "chunked")


def _decode(
    model: Model,
    tokens: Tokens,
    norm: tuple[Tensor, Tensor],
    state: State,
    lengths: Tensor | None,
    options: Options,
) -> Output:
    """Read one token a row: parameters are only read, but where a chunk ends."""
    chunk, filled, now = state.chunk, state.filled, state.now
    lengths = torch.ones_like(filled) if lengths is None else lengths.to(filled)
    inner = model.inner(norm, options, tokens.q)
    token = _learn(inner, now.start, tokens)
    place = torch.arange(chunk, device=filled.device) == filled[:, None]
    place = (place & (lengths[:, None] > 0))[:, None, :, None]
    now = now.map(lambda o, n: torch.where(place, n.to(o.dtype), o), token, start=False)

    coefficient, heads = state.coefficient.to(now.lr.dtype), tokens.q.shape[:2]
    steps = coefficient[filled].view(-1, 1, 1, 1) * now.lr.mT
    o = inner.answer(
        *([p.flatten(0, 1) for p in now.start], tokens.q.flatten(0, 1).to(now.lr.dtype)),
        [x.flatten(0, 1).to(now.lr.dtype) for x in now.inputs],
        [g.flatten(0, 1) for g in now.gradients],
        steps.flatten(0, 1),
    )
    o = torch.where(lengths.view(-1, 1, 1, 1) > 0, o.view(*heads, 1, -1), 0).to(tokens.q.dtype)

    past, ends = list(state.past), filled + lengths == chunk
    # On a GPU to look would mean to wait.
    if not ends.is_cpu or bool(ends.any()):
        moved: list[Tensor] = []
        for x, g in zip(now.inputs, now.gradients, strict=True):
            moved += sums(x.to(g.dtype), g, coefficient[-1] * now.lr, tokens.q.dtype)
        start = tuple(p - m for p, m in zip(now.start, moved, strict=True))
        begun = replace(now.first(torch.zeros_like(filled)), start=start)
        past = [
            a.where(ends, b).map(Tensor.detach) for a, b in zip((now, *past), past, strict=False)
        ]
        now = begun.where(ends, now)
    return Output(o, _advance(state, now, past, lengths), now.lr.new_empty(0), "decode")


def _learn(inner: Inner, start: Sequence[Tensor], tokens: Tokens) -> Chunk:
    """Return a chunk of tokens with what they teach at its start."""
    dtype, heads = start[0].dtype, tokens.q.shape[:2]
    k, v = (t.flatten(0, 1).to(dtype) for t in (tokens.k, tokens.v))
    learned = inner.learn([p.flatten(0, 1) for p in start], k, v)
    hidden = (x.view(*heads, *x.shape[1:]) for x in learned.inputs[1:])
    gradients = tuple(g.view(*heads, *g.shape[1:]) for g in learned.gradients)
    return Chunk(tuple(start), (tokens.k, *hidden), gradients, tokens.v, tokens.lr)


def _advance(state: State, now: Chunk, past: Sequence[Chunk], lengths: Tensor) -> State:
    remembered = (state.remembered + lengths).clamp(max=len(past) * state.chunk)
    return State(now, state.position + lengths, state.coefficient, tuple(past), remembered)
