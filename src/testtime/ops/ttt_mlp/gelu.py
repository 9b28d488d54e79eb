"""GELU in its tanh form, its slope and its curvature.

The authors' code writes the inner slope by hand with constants rounded to eight digits. Under
``official`` these are used; the exact ones are the default, and differ by less than 1e-9.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CUBIC = 0.044715
EXACT = (math.sqrt(2 / math.pi), 3 * CUBIC * math.sqrt(2 / math.pi))
OFFICIAL = (0.79788456, 0.1070322243)


def gelu(x: Tensor) -> Tensor:
    """Return x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    return F.gelu(x, approximate="tanh")


def slope(x: Tensor, constants: tuple[float, float] = EXACT) -> Tensor:
    """Return the derivative of gelu."""
    return _slope(x, *_tanh(x, constants))


def slope_and_curvature(x: Tensor, constants: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return the derivative of gelu, and the derivative of that one as it is written."""
    a, b = constants
    th, s, w = _tanh(x, constants)
    inner = a * (1 + 3 * CUBIC * x * x)
    return _slope(x, th, s, w), s * ((w + inner) / 2 + b * x * x - x * th * inner * w)


def _tanh(x: Tensor, constants: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    a, b = constants
    th = torch.tanh(a * x * (1 + CUBIC * x * x))
    return th, 1 - th * th, a + b * x * x


def _slope(x: Tensor, th: Tensor, s: Tensor, w: Tensor) -> Tensor:
    return (x * s * w + 1 + th) / 2
