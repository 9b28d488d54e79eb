"""One affine layer x W + b of an inner model, as the tokens of a chunk move and read it.

A chunk's K tokens have inputs x_j and gradients g_j with respect to the layer's output, all taken
at the parameters (W, b) that the chunk starts with. Token i reads W_i, that is
W - sum_j steps_ij x_j^T g_j, and b_i likewise. Shapes: ``x`` [..., K, A], ``g`` [..., K, Z], ``W``
[..., A, Z], ``b`` [..., 1, Z].

Source: arXiv 2407.04620, section 2.5 (the dual form); the bias is treated as a component of the
input that is always 1, hence the "+ 1".
"""

from collections.abc import Sequence
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
    """Cotangents of the arguments of ``moved`` but W and b, by their names."""

    x: Tensor
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
    """Return the cotangents of the arguments of ``moved``, given that of its value.

    Those of W and b are x^T times the cotangent and its sum: see ``Outer``.
    """
    scores = product(x, inputs.mT, operand) + 1
    attention = -product(cotangent, g.mT, operand)
    along = attention * steps
    return MovedCotangents(
        x=product(cotangent, w.mT, operand) + product(along, inputs, operand),
        inputs=product(along.mT, x, operand),
        g=-product((steps * scores).mT, cotangent, operand),
        steps=attention * scores,
    )


def sums(inputs: Tensor, g: Tensor, lr: Tensor, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the sums over a chunk's tokens of lr times gradient, for W and b; lr [..., K, 1]."""
    scaled = lr * g
    return product(inputs.mT, scaled, operand), scaled.sum(-2, keepdim=True)


class Outer:
    """The cotangents of W and b at every chunk's start: those behind it, and products x^T y.

    The products of a chunk lie one behind the other, so that they are one, [g, N, P K, .]; those of
    the first ``biased`` are b's as well.

    Args:
        xs: what was multiplied by W, [g, N, K, .]; what is not known yet is of the right shape, and
            filled in by ``put``.
        ys: cotangents of the products, likewise.
        d_w: cotangents of W, [g + 1, ...]; the last is given.
        d_b: of b, likewise.
        biased: of how many pairs the cotangent is the bias's too.
        operand: dtype of operands.
    """

    def __init__(
        self,
        xs: Sequence[Tensor],
        ys: Sequence[Tensor],
        d_w: Tensor,
        d_b: Tensor,
        biased: int,
        operand: torch.dtype,
    ) -> None:
        self.xs, self.ys = torch.cat(tuple(xs), -2).unbind(), torch.cat(tuple(ys), -2).unbind()
        self.d_w, self.d_b = d_w, d_b
        self.chunk, self.biased, self.operand = ys[0].shape[-2], biased, operand

    def put(self, j: int, pair: int, *, x: Tensor | None = None, y: Tensor | None = None) -> None:
        """Fill in what was not known yet of a pair in chunk j."""
        place = slice(pair * self.chunk, (pair + 1) * self.chunk)
        for whole, part in ((self.xs[j], x), (self.ys[j], y)):
            if part is not None:
                whole[:, place] = part

    def close(self, j: int) -> None:
        """Compute the cotangents at the start of chunk j, all of whose products are known."""
        add_product(self.d_w[j + 1], self.xs[j].mT, self.ys[j], self.operand, out=self.d_w[j])
        known = self.ys[j][:, : self.biased * self.chunk]
        torch.add(self.d_b[j + 1], known.sum(-2, keepdim=True), out=self.d_b[j])
