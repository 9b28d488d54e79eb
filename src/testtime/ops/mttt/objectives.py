"""What the learner is fitted to: each objective's loss, and its gradient at the prediction."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from testtime.ops.mttt.problem import Tokens


class Decoder(NamedTuple):
    """Reconstruction: the decoded prediction is held against the token itself.

    The loss of head k is ``H / (2 n D) sum |LN_k(m G_k + g_b) - x|^2`` (arXiv 2310.13807, section
    2; the scaling is that of the authors' code).

    Args:
        weight: G, ``[H, P, D]``.
        bias: g_b, ``[D]``, one for all heads.
        scale: of the decoder's LayerNorm, ``[H, D]``; none: no LayerNorm.
        shift: of the decoder's LayerNorm, ``[H, D]``.
        eps: of the decoder's LayerNorm.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 1e-6

    @property
    def squash(self) -> bool:
        """Whether inner gradients are squashed: never."""
        return False

    def loss(self, m: Tensor, tokens: Tokens) -> Tensor:
        """Return the loss [B, H] of predictions m [B, H, n, P]."""
        v = m @ self.weight + self.bias
        if self.scale is not None and self.shift is not None:
            normed, _ = _standardise(v, self.eps)
            v = normed * self.scale[:, None] + self.shift[:, None]
        square = (v - tokens.x).square().sum(-1, keepdim=True)
        return _total(square, tokens.valid) / (2 * self.normaliser(tokens))

    def error(self, tokens: Tokens) -> Callable[[Tensor], Tensor]:
        """Return the function from predictions m to E [B, H, n, P], not normalised.

        E is the gradient of half the squared error there: Z G^T, with Z that at the decoded token.
        """

        def at(m: Tensor) -> Tensor:
            v = m @ self.weight + self.bias
            if self.scale is None or self.shift is None:
                z = v - tokens.x
            else:
                scale = self.scale[:, None]
                normed, deviation = _standardise(v, self.eps)
                z = (normed * scale + self.shift[:, None] - tokens.x) * scale
                # The transposed derivative of LayerNorm.
                along = (z * normed).mean(-1, keepdim=True)
                z = (z - z.mean(-1, keepdim=True) - normed * along) / deviation
            return masked(z @ self.weight.mT, tokens.valid)

        return at

    def normaliser(self, tokens: Tokens) -> float | Tensor:
        """Return n D / H, a number or [B, H]."""
        heads, _, width = self.weight.shape
        return tokens.total() * (width / heads)


class Dot(NamedTuple):
    """Dot product with a value: the loss is ``-(scale / n) sum <m, v>`` (arXiv 2512.01643).

    Args:
        scale: a factor; the authors' code has 1/3, their paper 1/sqrt(P).
        squash: whether each column g of an inner gradient (each kernel of a convolution) becomes
            ``g / (1 + |g|)``. The authors' code always does, their paper does not mention it.
    """

    scale: float = 1 / 3
    squash: bool = True

    def loss(self, m: Tensor, tokens: Tokens) -> Tensor:
        """Return the loss [B, H] of predictions m [B, H, n, P]."""
        return -self.scale * _total(m * tokens.x, tokens.valid) / self.normaliser(tokens)

    def error(self, tokens: Tokens) -> Tensor:
        """Return the gradient at the prediction, not normalised: it does not depend on that."""
        return masked(-self.scale * tokens.x, tokens.valid)

    def normaliser(self, tokens: Tokens) -> float | Tensor:
        """Return n, a number or [B, 1]."""
        return tokens.total()


Objective = Decoder | Dot


def _standardise(v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred = v - v.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation, deviation


def masked(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return x with zeros at the padded tokens."""
    # Not a product: what stands at a padded token may be NaN.
    return x if valid is None else torch.where(valid > 0, x, 0)


def _total(x: Tensor, valid: Tensor | None) -> Tensor:
    return masked(x, valid).sum((-2, -1))
