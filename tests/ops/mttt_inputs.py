"""Inputs of the operator for its tests: small, ragged, float64, nothing zero."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from testtime.ops.mttt import Decoder, Dot, mttt

BATCH, HEADS, TOKENS, WIDTH, TOKEN = 2, 3, 13, 4, 10
GRID = (3, 5)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    x: Tensor
    w0: dict[str, Tensor]
    decoder: Decoder | Dot
    learner: str

    def leaves(self) -> list[Tensor]:
        of_decoder = self.decoder[:4] if isinstance(self.decoder, Decoder) else ()
        return [
            self.q,
            self.k,
            self.x,
            *self.w0.values(),
            *(t for t in of_decoder if t is not None),
        ]

    def run(self, **kwargs: Any) -> tuple[Tensor, Tensor | None, dict[str, Tensor] | None]:
        grid = {"grid": GRID} if self.learner == "dwconv" else {}
        return mttt(*self[:5], learner=self.learner, **grid, **kwargs)


def inputs(
    learner: str = "mlp", norm: bool = True, bias: bool = True, dtype: torch.dtype = torch.float64
) -> Inputs:
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        values = 0.5 * torch.randn(*shape, generator=draw, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    tokens = GRID[0] * GRID[1] if learner == "dwconv" else TOKENS
    shapes: Mapping[str, tuple[int, ...]] = {
        "linear": {"weight": (WIDTH, WIDTH), "bias": (WIDTH,)},
        "mlp": {
            "weight_1": (WIDTH, 4 * WIDTH),
            "bias_1": (4 * WIDTH,),
            "weight_2": (4 * WIDTH, WIDTH),
            "bias_2": (WIDTH,),
        },
        "glu": {"weight_1": (WIDTH, WIDTH), "weight_2": (WIDTH, WIDTH)},
        "dwconv": {"weight": (WIDTH, 3, 3)},
    }[learner]
    w0 = {n: leaf(HEADS, *s) for n, s in shapes.items() if bias or not n.startswith("bias")}
    q, k = leaf(BATCH, HEADS, tokens, WIDTH), leaf(BATCH, HEADS, tokens, WIDTH)
    if learner in ("glu", "dwconv"):
        return Inputs(q, k, leaf(BATCH, HEADS, tokens, WIDTH), w0, Dot(), learner)
    decoder = Decoder(leaf(HEADS, WIDTH, TOKEN), leaf(TOKEN))
    if norm:
        decoder = decoder._replace(scale=leaf(HEADS, TOKEN), shift=leaf(HEADS, TOKEN))
    return Inputs(q, k, leaf(BATCH, tokens, TOKEN), w0, decoder, learner)


def outcome(given: Inputs, **kwargs: Any) -> list[Tensor]:
    """Return answers, losses, adapted weights, and every gradient of a random function of them."""
    o, losses, state = given.run(losses=True, state=True, **kwargs)
    assert losses is not None
    assert state is not None
    draw = torch.Generator().manual_seed(1)
    total = sum(
        (out * torch.randn(out.shape, generator=draw, dtype=torch.float64)).sum()
        for out in (o, *state.values())
    )
    leaves = given.leaves()
    if isinstance(rate := kwargs.get("inner_lr"), Tensor):
        leaves.append(rate)
    assert isinstance(total, Tensor)
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [o, losses, *state.values(), *grads]


def gap(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest relative difference; one that is not a number counts as infinite."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        off = float((a - b).detach().abs().max() / (1e-3 + b.detach().abs().max()))
        worst = max(worst, off if off == off else float("inf"))
    return worst
