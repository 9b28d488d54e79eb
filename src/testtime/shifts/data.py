"""Data that were read: samples with labels, and what a row of results says about them."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class Samples(Protocol):
    """Samples that are read when they are asked for; a tensor ``[N, ...]`` is one too."""

    def __len__(self) -> int:
        """The number of samples."""
        ...

    def __getitem__(self, index: list[int], /) -> Tensor:
        """The samples of these indices, ``[B, ...]``, float32."""
        ...


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled samples: images, signals, or rows of a table.

    >>> data = Data("noise", torch.rand(9, 3, 32, 32), torch.arange(9), sha256="")
    >>> image, label = data[4]
    >>> data.take(data.labels > 6).labels
    tensor([7, 8])

    A PyTorch ``DataLoader`` takes it as it is.

    Args:
        name: what it is called in results; a fixed split is part of the name.
        samples: float32 ``[N, ...]``; images are ``[N, C, H, W]`` in [0, 1]. Either a tensor, or
            ``Samples`` that are read when they are asked for.
        labels: ``[N]``, integers.
        sha256: of what they were read from, which ``sha256_of`` names.
        sha256_of: "file", "values", or "paths and sizes" of many files.
        order: where the order of the samples comes from.
        preprocessing: what was done to the samples on reading, beyond the step to [0, 1].
        classes: names of the classes, where they are more than numbers.
        groups: ``[N]``, integers: the patient or place of each sample.
        timestamps: ``[N]``, seconds, float64.

    Raises:
        ValueError: there are no samples, or not as many labels, groups or timestamps as samples.
        TypeError: the labels are not integers.
    """

    name: str
    samples: Tensor | Samples = field(repr=False)
    labels: Tensor = field(repr=False)
    sha256: str
    sha256_of: str = "file"
    order: str = "as stored"
    preprocessing: str = "none"
    classes: tuple[str, ...] = field(default=(), repr=False)
    groups: Tensor | None = field(default=None, repr=False)
    timestamps: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not len(self.samples):
            raise ValueError(f"{self.name} has no samples. Give data with at least one.")
        if self.labels.is_floating_point() or self.labels.is_complex():
            raise TypeError(
                f"The labels of {self.name} are {self.labels.dtype}. Give integers, class indices."
            )
        for what in ("labels", "groups", "timestamps"):
            values = getattr(self, what)
            if values is not None and values.shape != (len(self.samples),):
                raise ValueError(
                    f"{self.name} has {len(self.samples)} samples but {what} of shape "
                    f"{list(values.shape)}. Give one for each sample."
                )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        # Without this check a loop over the data would never end: indices from the end are fine.
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, there is no number {index}.")
        index %= len(self)
        return self.samples[[index]][0], int(self.labels[index])

    @cached_property
    def images(self) -> Tensor:
        """All samples as one tensor ``[N, ...]``, read once and kept."""
        every = [*range(len(self))]
        return self.samples if isinstance(self.samples, Tensor) else self.samples[every]

    def load(self) -> "Data":
        """Give the same data with all samples in memory, for what reads them many times."""
        return replace(self, samples=self.images)

    def take(self, which: Tensor | Sequence[int]) -> "Data":
        """Give some of the samples, by their indices or by a mask ``[N]`` of booleans.

        Raises:
            IndexError: an index is out of range, or a mask has another length.
        """
        index = torch.arange(len(self))[torch.as_tensor(which)]
        taken = hashlib.sha256(str(index.tolist()).encode()).hexdigest()
        return replace(
            self,
            samples=_Taken(self.samples, index),
            labels=self.labels[index],
            order=f"{self.order}; {len(index)} taken by indices of sha256 {taken}",
            groups=None if self.groups is None else self.groups[index],
            timestamps=None if self.timestamps is None else self.timestamps[index],
        )

    def fingerprint(self) -> dict[str, str | int]:
        """Say what the data are, as plain values for a row of results."""
        return {
            "name": self.name,
            "count": len(self),
            "order": self.order,
            "sha256": self.sha256,
            "sha256_of": self.sha256_of,
            "preprocessing": self.preprocessing,
        }


@dataclass(frozen=True, eq=False)
class _Taken:
    samples: Tensor | Samples
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: list[int], /) -> Tensor:
        return self.samples[self.index[index].tolist()]


@contextmanager
def extra_data(what: str) -> Iterator[None]:
    """Name the extra that brings what an import inside the block does not find."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{what} needs {error.name}: pip install 'testtime[data]'.") from error
