"""How features are distributed, how far that is from the source's, and how views are told apart."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean and spread of features ``[n, d]``, such that those of two sets give that of both.

    Args:
        rows: ``n``.
        mean: ``[d]``.
        scatter: sum over the rows of ``(f - mean) (f - mean)^T``, ``[d, d]``.
    """

    rows: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, f: Tensor) -> Self:
        """Return the moments of the rows."""
        mean = f.mean(0)
        rows = torch.full((), len(f), dtype=f.dtype, device=f.device)
        return cls(rows, mean, (f - mean).T @ (f - mean))

    def plus(self, other: "Moments", share: Tensor | float = 1.0) -> "Moments":
        """Return the moments of both sets, each row of the other counting for a share."""
        more, apart = share * other.rows, other.mean - self.mean
        rows = self.rows + more
        scatter = (
            self.scatter + share * other.scatter + apart.outer(apart) * self.rows * more / rows
        )
        return Moments(rows, self.mean + apart * more / rows, scatter)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance ``[d, d]``."""
        return self.scatter / (self.rows - 1)


def coral(covariance: Tensor, other: Tensor) -> Tensor:
    """Return the squared distance of two covariances ``[d, d]``, over ``4 d^2``."""
    return (covariance - other).square().sum() / (4 * len(covariance) ** 2)


def mmd(mean: Tensor, other: Tensor) -> Tensor:
    """Return the mean squared distance of two means ``[d]``."""
    return (mean - other).square().mean()


def contrastive(f: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss of unit rows ``[2 B, d]``: first views, then second ones.

    ``-mean_i (s_ij - ln sum_{k != i} exp s_ik)``, with ``s = f f^T / temperature`` and ``j`` the
    other view of ``i``. SimCLR, 2002.05709, equation 1.
    """
    itself = torch.eye(len(f), dtype=torch.bool, device=f.device)
    similar = (f @ f.T / temperature).masked_fill(itself, -torch.inf)
    other = torch.arange(len(f), device=f.device).roll(len(f) // 2)
    return -similar.log_softmax(1).gather(1, other[:, None]).mean()
