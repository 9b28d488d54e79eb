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


class Summary:
    """Moments of the source, and by how much two of its batches differ.

    The first batch is there to be compared with, and does not count in the moments.
    """

    def __init__(self) -> None:
        self._first: Moments | None = None
        self._rest: Moments | None = None
        self._gaps: dict[str, list[Tensor]] = {"coral": [], "mmd": []}

    def add(self, f: Tensor) -> None:
        """Take in the features ``[n, d]`` of a batch."""
        now = Moments.of(f)
        if self._first is None:
            self._first = now
            return
        self._gaps["coral"].append(coral(self._first.covariance, now.covariance))
        self._gaps["mmd"].append(mmd(self._first.mean, now.mean))
        self._rest = now if self._rest is None else self._rest.plus(now)

    def constants(self) -> dict[str, Tensor]:
        """Return covariance (``cov``), ``mean``, and the mean distances ``coral`` and ``mmd``.

        Raises:
            ValueError: there were fewer than three batches, or all were alike.
        """
        if self._rest is None or len(self._gaps["mmd"]) < 2:
            raise ValueError(
                "Alignment needs at least three batches of source data, one to compare the others "
                "with. Pass more in source=, each of the size of a test batch."
            )
        gaps = {kind: torch.stack(values).mean() for kind, values in self._gaps.items()}
        if not all(bool(gap > 0) for gap in gaps.values()):
            raise ValueError(
                "Alignment is measured by how much batches of source data differ, but these are "
                "all alike. Pass different images in each."
            )
        return gaps | {"cov": self._rest.covariance, "mean": self._rest.mean}


def contrastive(f: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss of unit rows ``[2 B, d]``: first views, then second ones.

    ``-mean_i (s_ij - ln sum_{k != i} exp s_ik)``, with ``s = f f^T / temperature`` and ``j`` the
    other view of ``i``. SimCLR, 2002.05709, equation 1.
    """
    itself = torch.eye(len(f), dtype=torch.bool, device=f.device)
    similar = (f @ f.T / temperature).masked_fill(itself, -torch.inf)
    other = torch.arange(len(f), device=f.device).roll(len(f) // 2)
    return -similar.log_softmax(1).gather(1, other[:, None]).mean()
