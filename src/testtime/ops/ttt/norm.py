"""The inner loss ``1/2 ||LN(z) - t||^2``: its gradient with respect to z, and the way back."""

from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """LayerNorm of the inner model over the last axis; it does not move inside a sequence.

    ``weight`` and ``bias`` broadcast against ``[..., K, D]``.
    """

    weight: Tensor
    bias: Tensor
    eps: float


class Normalised(NamedTuple):
    """Vectors z with zero mean and unit variance, and what it takes to go back.

    ``hat = (z - mean) * rstd``; the variance is the biased one, eps is inside the root.
    """

    z: Tensor
    hat: Tensor
    mean: Tensor
    rstd: Tensor

    def pull(self, cotangent: Tensor) -> Tensor:
        """Return the cotangent of z, given that of ``hat``.

        That is J(h) * rstd with J(h) = h - mean(h) - hat * mean(h * hat).
        """
        backward = torch.ops.aten.native_layer_norm_backward
        shape, one = self.z.shape[-1:], [True, False, False]
        pulled: Tensor = backward(cotangent, self.z, shape, self.mean, self.rstd, None, None, one)[
            0
        ]
        return pulled


def normalise(z: Tensor, eps: float) -> Normalised:
    """Return z with zero mean and unit variance along the last axis."""
    return Normalised(z, *torch.native_layer_norm(z, z.shape[-1:], None, None, eps))


class Descent(NamedTuple):
    """The gradient ``g`` of the inner loss with respect to z, token by token."""

    at: Normalised
    error: Tensor  # LN(z) - t
    g: Tensor

    @property
    def loss(self) -> Tensor:
        """Return the inner loss of each token."""
        return self.error.square().sum(-1) / 2


def descend(z: Tensor, target: Tensor, norm: Norm) -> Descent:
    """Return the gradient of ``1/2 ||LN(z) - target||^2`` with respect to z."""
    at = normalise(z, norm.eps)
    error = torch.addcmul(norm.bias - target, norm.weight, at.hat)
    return Descent(at, error, at.pull(norm.weight * error))


class DescentBackward:
    """The backward of ``descend`` for a group of chunks [g, N, K, D], chunk by chunk.

    What does not wait for the chunk behind is computed for all at once.
    """

    def __init__(self, descent: Descent, norm: Norm) -> None:
        at, along = descent.at, norm.weight * descent.error
        mean = (along * at.hat).mean(-1, keepdim=True)
        self.square = norm.weight.square()
        columns = (*at, descent.g, along, mean)
        self.chunks = list(zip(*(t.unbind() for t in columns), strict=True))

    def __call__(self, j: int, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cotangents of z and of ``weight * error`` in chunk j, given that of g.

        The first is all that the chunk before has to wait for; the rest follows from the second.
        """
        *normalised, g, along, mean = self.chunks[j]
        at = Normalised(*normalised)
        h = cotangent * at.rstd
        pulled = at.pull(cotangent)
        hat = torch.addcmul(self.square * pulled, h, mean, value=-1)
        hat.addcmul_(along, (h * at.hat).mean(-1, keepdim=True), value=-1)
        d_z = at.pull(hat).addcmul_(at.hat, (h * g).mean(-1, keepdim=True), value=-1)
        return d_z, pulled
