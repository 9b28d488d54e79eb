"""Any iterable of pairs ``(x, y)``: a PyTorch data set or loader, a generator, a list."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from testtime.shifts.data import Data, extra_data
from testtime.shifts.readers.arrays import assemble, samples_of, sha256_of

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Items:
    """The samples of an indexable data set of pairs, read when they are asked for."""

    dataset: Any
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: list[int], /) -> Tensor:
        import numpy as np

        arrays = [_array(self.dataset[i][0]) for i in index]
        for i, array in zip(index, arrays, strict=True):
            _check_shape(array.shape, arrays[0].shape, f"Pair {i} of {self.name}")
        return samples_of(np.stack(arrays), self.name)[[*range(len(index))]]


def read_pairs(
    pairs: Iterable[tuple[Any, Any]], *, name: str, labels: Sequence[int] | Tensor | None = None
) -> Data:
    """Read pairs of sample and label, or of a batch of samples and their labels.

    >>> import torch
    >>> data = read_pairs([(torch.zeros(3, 32, 32), 7), (torch.ones(3, 32, 32), 1)], name="two")
    >>> len(data), data.labels
    (2, tensor([7, 1]))

    They are read into memory; not so an indexable data set of single samples whose labels are given
    apart, which is then known by these alone (``sha256_of``).

    Args:
        pairs: something that ends. Samples are tensors, arrays or Pillow's images, all of one
            shape; labels are integers. Images are uint8, or floats in [0, 1]; see ``read_npz``.
        name: what the data are called in results.
        labels: all labels of an indexable data set, such as the ``targets`` of torchvision's.

    Raises:
        TypeError: something else than pairs came.
        ValueError: shapes differ, or values are not what they should be.
        ImportError: it needs the extra ``data``.
    """
    with extra_data("Reading pairs"):
        import numpy as np
    if labels is not None:
        y = np.asarray(labels)
        about = {"name": name, "sha256": sha256_of(y), "sha256_of": "labels"}
        return assemble(Items(pairs, name), {"y": y}, name, **about)
    if not hasattr(pairs, "__iter__") and hasattr(pairs, "__getitem__"):
        # A PyTorch data set need not raise an IndexError at its end.
        pairs = map(pairs.__getitem__, range(len(pairs)))  # type: ignore[arg-type]
    samples: list[np.ndarray[Any, Any]] = []
    found: list[np.ndarray[Any, Any]] = []
    for number, pair in enumerate(pairs):
        where = f"Pair {number} of {name}"
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{where} is a {type(pair).__name__}, not (x, y). Give pairs.")
        x, y = map(_array, pair)
        if y.ndim == 0:
            x, y = x[None], y[None]
        if y.ndim != 1 or x.ndim == 0 or len(x) != len(y):
            raise ValueError(
                f"{where}: x is {list(x.shape)} and y {list(y.shape)}. Give one label a sample."
            )
        if samples:
            _check_shape(x.shape[1:], samples[0].shape[1:], where)
        samples.append(x)
        found.append(y)
    if not samples:
        raise ValueError(f"{name} has no pairs. An iterator can be read only once; make a new one.")
    x, y = np.concatenate(samples), np.concatenate(found)
    return assemble(samples_of(x, name), {"y": y}, name, name=name, sha256=sha256_of(x, y))


def _array(value: Any) -> "np.ndarray[Any, Any]":
    import numpy as np

    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


def _check_shape(shape: tuple[int, ...], first: tuple[int, ...], where: str) -> None:
    if shape != first:
        raise ValueError(
            f"{where} has samples of shape {list(shape)}, those before {list(first)}. Bring all to "
            "one shape."
        )
