"""The loop over chunks as an operator of torch, with a fake form and its backward.

``register`` makes ``torch.ops.testtime.<name>``, so that ``torch.compile`` and ``torch.export``
take it as one node and a kernel for one device can take its place there.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from testtime.ops.ttt.chunks import Grid, Inner, Tokens, backward, forward
from testtime.ops.ttt.norm import Norm

MakeInner = Callable[[Norm, torch.dtype, bool], Inner]


class Results(NamedTuple):
    """What the operator returns; shapes as the arguments of ``Operator``."""

    o: Tensor
    losses: Tensor  # [2, B, H, T], before and after, or empty
    end: list[Tensor]
    checkpoints: list[Tensor]
    past: list[Tensor]  # [past, B, H, ...]


Operator = Callable[..., Results]


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of state and normalisation for operands of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def register(name: str, make: MakeInner) -> Operator:
    """Register ``testtime::<name>`` and return a function that calls it.

    The function takes q, k, v ``[B, H, T, D]``, lr ``[B, H, T]`` with T a multiple of the chunk K,
    the position coefficient ``[K]``, the norm's weight and bias ``[H, D]``, the start parameters
    ``[B, H, ...]``, the number of chunks that each row closes ``[B]``, then ``eps``, ``official``,
    ``size`` (chunks of a group), ``keep`` (checkpoints for the backward), ``past`` (how many starts
    of closed chunks to return) and ``losses``.
    """

    @torch.library.custom_op(f"testtime::{name}", mutates_args=())
    def operator(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lr: Tensor,
        coefficient: Tensor,
        weight: Tensor,
        bias: Tensor,
        start: Sequence[Tensor],
        closed: Tensor,
        eps: float,
        official: bool,
        size: int,
        keep: bool,
        past: int,
        losses: bool,
    ) -> list[Tensor]:
        norm = (weight, bias, eps)
        inner, tokens, grid = _inside(make, q, k, v, lr, coefficient, norm, closed, official)
        found = forward(
            inner,
            tokens,
            grid,
            [p.flatten(0, 1).to(tokens.q.dtype) for p in start],
            size=size,
            keep=keep,
            past=past,
            losses=losses,
        )
        heads = q.shape[:2]
        both = [_from_chunks(one[..., None], heads)[..., 0] for one in found.losses]
        return [
            _from_chunks(found.o, heads).to(q.dtype),
            torch.stack(both) if both else found.o.new_empty(0),
            *(p.view(*heads, *p.shape[1:]).clone() for p in found.end),
            *found.checkpoints,
            *(p.view(past, *heads, *p.shape[2:]) for p in found.past),
        ]

    @operator.register_fake
    def _(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lr: Tensor,
        coefficient: Tensor,
        weight: Tensor,
        bias: Tensor,
        start: Sequence[Tensor],
        closed: Tensor,
        eps: float,
        official: bool,
        size: int,
        keep: bool,
        past: int,
        losses: bool,
    ) -> list[Tensor]:
        dtype, rows = accumulation(q.dtype), q.shape[0] * q.shape[1]
        count = -(-(q.shape[2] // len(coefficient)) // size)  # a checkpoint a group
        ends = [p.new_empty(p.shape, dtype=dtype) for p in start]
        return [
            torch.empty_like(q, memory_format=torch.contiguous_format),
            q.new_empty((2, *lr.shape) if losses else (0,), dtype=dtype),
            *ends,
            *(p.new_empty((count, rows, *p.shape[2:]) if keep else (0,)) for p in ends),
            *(p.new_empty(past, *p.shape) for p in ends),
        ]

    @torch.library.custom_op(f"testtime::{name}_backward", mutates_args=())
    def operator_backward(
        d_o: Tensor,
        d_end: Sequence[Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lr: Tensor,
        coefficient: Tensor,
        weight: Tensor,
        bias: Tensor,
        checkpoints: Sequence[Tensor],
        closed: Tensor,
        eps: float,
        official: bool,
        size: int,
    ) -> list[Tensor]:
        norm = (weight, bias, eps)
        inner, tokens, grid = _inside(make, q, k, v, lr, coefficient, norm, closed, official)
        dtype, heads = tokens.q.dtype, q.shape[:2]
        found = backward(
            inner,
            tokens,
            grid,
            checkpoints,
            _to_chunks(d_o, len(coefficient), dtype),
            [p.flatten(0, 1).to(dtype) for p in d_end],
            size=size,
        )
        d_q, d_k, d_v, d_lr = (_from_chunks(t, heads) for t in found.tokens)
        d_weight, d_bias = (
            d.view(len(d), *heads, *d.shape[2:]).sum((0, 1, 3)) for d in (found.weight, found.bias)
        )
        return [
            *(d.to(t.dtype) for d, t in zip((d_q, d_k, d_v), (q, k, v), strict=True)),
            d_lr[..., 0].to(lr.dtype),
            found.coefficient.to(coefficient.dtype),
            d_weight.to(weight.dtype),
            d_bias.to(bias.dtype),
            *(p.view(*heads, *p.shape[1:]).clone() for p in found.start),
        ]

    @operator_backward.register_fake
    def _(
        d_o: Tensor,
        d_end: Sequence[Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lr: Tensor,
        coefficient: Tensor,
        weight: Tensor,
        bias: Tensor,
        checkpoints: Sequence[Tensor],
        closed: Tensor,
        eps: float,
        official: bool,
        size: int,
    ) -> list[Tensor]:
        dtype, inputs = accumulation(q.dtype), (q, k, v, lr, coefficient, weight, bias)
        return [
            *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs),
            *(p.new_empty(p.shape, dtype=dtype) for p in d_end),
        ]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        *tensors, start, closed, ctx.eps, ctx.official, ctx.size, keep, _, _ = inputs
        count = ctx.count = len(start)
        ctx.dtypes = [p.dtype for p in start]
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.keep = output[0].shape, keep
        ctx.save_for_backward(*tensors, closed, *output[2 : 2 + 2 * count])

    def pull(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        if not ctx.keep:
            raise RuntimeError(f"testtime::{name} was called with keep=False: it has no backward.")
        every = ctx.saved_tensors
        (*tensors, closed), saved = every[:8], every[8:]
        ends, checkpoints = saved[: ctx.count], saved[ctx.count :]
        given = grads[2 : 2 + ctx.count]
        d_o = torch.zeros_like(tensors[0]) if grads[0] is None else grads[0]
        d_end = [torch.zeros_like(p) if d is None else d for p, d in zip(ends, given, strict=True)]
        found = operator_backward(
            d_o, d_end, *tensors, checkpoints, closed, ctx.eps, ctx.official, ctx.size
        )
        d_start = [d.to(dtype) for d, dtype in zip(found[7:], ctx.dtypes, strict=True)]
        return (*found[:7], d_start, *[None] * 7)

    operator.register_autograd(pull, setup_context=setup_context)

    def call(*arguments: Any) -> Results:
        o, losses, *rest = operator(*arguments)
        count = len(arguments[7])
        return Results(o, losses, rest[:count], rest[count : 2 * count], rest[2 * count :])

    return call


def _inside(
    make: MakeInner,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    coefficient: Tensor,
    norm: tuple[Tensor, Tensor, float],
    closed: Tensor,
    official: bool,
) -> tuple[Inner, Tokens, Grid]:
    """Return the inner model and the tokens as the loop over chunks takes them."""
    dtype, chunk, (batch, heads) = accumulation(q.dtype), len(coefficient), q.shape[:2]
    tokens = Tokens(*(_to_chunks(t, chunk, dtype) for t in (q, k, v, lr[..., None])))
    grid = Grid(tokens.lr, coefficient.to(dtype), closed.repeat_interleave(heads))
    return make(rows_norm(*norm, batch, dtype), q.dtype, official), tokens, grid


def rows_norm(weight: Tensor, bias: Tensor, eps: float, batch: int, dtype: torch.dtype) -> Norm:
    """Return the norm of ``[H, D]`` for ``[B H, K, D]``."""
    one, two = (t.to(dtype).repeat(batch, 1)[:, None] for t in (weight, bias))
    return Norm(one, two, eps)


def _to_chunks(x: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """From [B, H, n K, D] to [n, B H, K, D]."""
    return (
        x.reshape(x.shape[0] * x.shape[1], -1, chunk, x.shape[3])
        .transpose(0, 1)
        .to(dtype)
        .contiguous()
    )


def _from_chunks(x: Tensor, heads: Sequence[int]) -> Tensor:
    """From [n, B H, K, D] to [B, H, n K, D]."""
    return x.transpose(0, 1).reshape(*heads, -1, x.shape[3])
