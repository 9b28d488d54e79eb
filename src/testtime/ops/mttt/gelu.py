"""GELU in its tanh form, ``p (1 + tanh(w)) / 2`` with ``w = sqrt(2 / pi) (p + 0.044715 p^3)``."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROOT = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def gelu(p: Tensor) -> Tensor:
    """Return GELU."""
    return F.gelu(p, approximate="tanh")


def times_slope(f: Tensor, p: Tensor) -> Tensor:
    """Return f times GELU's derivative at p; both can be differentiated, twice too."""
    out: Tensor = _TimesSlope.apply(f, p)  # type: ignore[no-untyped-call]
    return out


def curvature(p: Tensor) -> Tensor:
    """Return GELU's second derivative."""
    square = p * p
    tau = (p * (_ROOT + _ROOT * _CUBIC * square)).tanh()
    rise = _ROOT + 3 * _ROOT * _CUBIC * square  # the derivative of w
    return (1 - tau * tau) * (2 * rise - _ROOT - p * tau * rise.square())


class _TimesSlope(torch.autograd.Function):
    """Keeps its two arguments, where elementary operations would keep a dozen tensors."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(f, p)
        return _slope(f, p)

    @staticmethod
    def backward(ctx: Any, out_: Tensor) -> tuple[Tensor, Tensor]:
        f, p = ctx.saved_tensors
        return _slope(out_, p), out_ * f * curvature(p)


def _slope(f: Tensor, p: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten.gelu_backward(f, p, approximate="tanh")
    return out
