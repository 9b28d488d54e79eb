"""One affine layer x W + b of an inner model, as the tokens of a chunk move and read it.

A chunk's K tokens have inputs x_j and gradients g_j with respect to the layer's output, all taken
at the parameters (W, b) that the chunk starts with. Token i reads W_i, that is
W - sum_j steps_ij x_j^T g_j, and b_i likewise. Shapes: ``x`` [..., K, A], ``g`` [..., K, Z], ``W``
[..., A, Z], ``b`` [..., 1, Z].

Source: arXiv 2407.04620, section 2.5 (the dual form); the bias is treated as a component of the
input that is always 1, hence the "+ 1".
"""

from typing import NamedTuple

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, operand: torch.dtype) -> Tensor:
    """Return a b with both rounded to the operands' dtype, summed up in their own."""
    return _rounded(a, operand) @ _rounded(b, operand)


def add_product(
    base: Tensor, a: Tensor, b: Tensor, operand: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return base + a b in one step, for tensors [N, ., .], written to ``out`` if there is one."""
    return torch.baddbmm(base, _rounded(a, operand), _rounded(b, operand), out=out)


def _rounded(x: Tensor, operand: torch.dtype) -> Tensor:
    return x.to(operand).to(x.dtype) if operand in (torch.bfloat16, torch.float16) else x


def moved(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    inputs: Tensor,
    g: Tensor,
    steps: Tensor,
    operand: torch.dtype,
) -> Tensor:
    """Return x_i W_i + b_i: what each token reads, without forming any W_i."""
    attention = steps * (product(x, inputs.mT, operand) + 1)
    return product(x, w, operand) + b - product(attention, g, operand)


class MovedCotangents(NamedTuple):
    """Cotangents of the arguments of ``moved``, by their names."""

    x: Tensor
    w: Tensor
    b: Tensor
    inputs: Tensor
    g: Tensor
    steps: Tensor


def moved_backward(
    x: Tensor,
    w: Tensor,
    inputs: Tensor,
    g: Tensor,
    steps: Tensor,
    operand: torch.dtype,
    cotangent: Tensor,
) -> MovedCotangents:
    """Return the cotangents of all arguments of ``moved``, given that of its value."""
    scores = product(x, inputs.mT, operand) + 1
    attention = -product(cotangent, g.mT, operand)
    along = attention * steps
    return MovedCotangents(
        x=product(cotangent, w.mT, operand) + product(along, inputs, operand),
        w=product(x.mT, cotangent, operand),
        b=cotangent.sum(-2, keepdim=True),
        inputs=product(along.mT, x, operand),
        g=-product((steps * scores).mT, cotangent, operand),
        steps=attention * scores,
    )


def sums(inputs: Tensor, g: Tensor, lr: Tensor, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the sums over a chunk's tokens of lr times gradient, for W and b; lr [..., K, 1]."""
    scaled = lr * g
    return product(inputs.mT, scaled, operand), scaled.sum(-2, keepdim=True)
