"""TTT-Linear token by token: what every faster form is held to."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from testtime.ops.ttt.reference import token_by_token


def linear(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return x W + b."""
    w, b = parameters
    return x @ w + b


def ttt_linear_reference(
    *arguments: Any, **options: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return what ``token_by_token`` does, of a linear model; its further arguments."""
    return token_by_token(linear, *arguments, **options)
