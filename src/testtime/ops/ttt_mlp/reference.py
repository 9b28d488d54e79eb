"""TTT-MLP token by token: what every faster form is held to."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from testtime.ops.ttt.reference import token_by_token
from testtime.ops.ttt_mlp.gelu import gelu


def perceptron(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return gelu(x W1 + b1) W2 + b2."""
    w1, b1, w2, b2 = parameters
    return gelu(x @ w1 + b1) @ w2 + b2


def ttt_mlp_reference(*arguments: Any, **options: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return what ``token_by_token`` does, of a perceptron; its further arguments."""
    return token_by_token(perceptron, *arguments, **options)
