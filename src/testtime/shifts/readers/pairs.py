"""Any iterable of pairs ``(x, y)``: a PyTorch data set or loader, a generator, a list."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from testtime.shifts.data import Data, extra_data
from testtime.shifts.readers.arrays import assemble, samples_of, sha256_of


def read_pairs(pairs: Iterable[tuple[Any, Any]], *, name: str) -> Data:
    """Read pairs of sample and label, or of a batch of samples and their labels, into memory.

    >>> import torch
    >>> data = read_pairs([(torch.zeros(3, 32, 32), 7), (torch.ones(3, 32, 32), 1)], name="two")
    >>> len(data), data.labels
    (2, tensor([7, 1]))

    Args:
        pairs: something that ends. Samples are tensors, arrays or Pillow's images, all of one
            shape; labels are integers. Images are uint8, or floats in [0, 1]; see ``read_npz``.
        name: what the data are called in results.

    Raises:
        TypeError: something else than pairs came.
        ValueError: shapes differ, or values are not what they should be.
        ImportError: it needs the extra ``data``.
    """
    with extra_data("Reading pairs"):
        import numpy as np
    if not hasattr(pairs, "__iter__") and hasattr(pairs, "__getitem__"):
        # A PyTorch data set need not raise an IndexError at its end.
        pairs = map(pairs.__getitem__, range(len(pairs)))  # type: ignore[arg-type]
    samples: list[np.ndarray[Any, Any]] = []
    labels: list[np.ndarray[Any, Any]] = []
    for number, pair in enumerate(pairs):
        where = f"Pair {number} of {name}"
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{where} is a {type(pair).__name__}, not (x, y). Give pairs.")
        x, y = (
            np.asarray(part.detach().cpu() if isinstance(part, Tensor) else part) for part in pair
        )
        if y.ndim == 0:
            x, y = x[None], y[None]
        if y.ndim != 1 or x.ndim == 0 or len(x) != len(y):
            raise ValueError(
                f"{where}: x is {list(x.shape)} and y {list(y.shape)}. Give one label a sample."
            )
        if samples and x.shape[1:] != samples[0].shape[1:]:
            raise ValueError(
                f"{where} has samples of shape {list(x.shape[1:])}, those before "
                f"{list(samples[0].shape[1:])}. Bring all to one shape."
            )
        samples.append(x)
        labels.append(y)
    if not samples:
        raise ValueError(f"{name} has no pairs. An iterator can be read only once; make a new one.")
    x, y = np.concatenate(samples), np.concatenate(labels)
    return assemble(samples_of(x, name), {"y": y}, name, name=name, sha256=sha256_of(x, y))
