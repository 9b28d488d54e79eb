"""Labelled images by name, read whole into memory."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """Labelled images.

    Args:
        name: what it is called in results; a fixed split is part of the name.
        images: ``[N, 3, H, W]`` in [0, 1], float32.
        labels: ``[N]``, int64.
        sha256: of the file that they were read from.
    """

    name: str
    images: Tensor
    labels: Tensor
    sha256: str


def load_data(spec: str) -> Data:
    """Return labelled images by their specification.

    Args:
        spec: ``digits`` (the 797 embedded test digits) or ``cifar10:FILE.parquet`` (columns ``img``
            with encoded images and ``label``).

    Raises:
        ValueError, FileNotFoundError: what was wrong, and what would do.
        ImportError: reading parquet needs the extra ``data``.
    """
    kind, _, path = spec.partition(":")
    if kind == "digits":
        from testtime import demo

        images, labels = demo.digits("test")
        return Data(demo.SPLIT, images, labels, demo.sha256())
    if kind == "cifar10":
        return _parquet(Path(path))
    raise ValueError(
        f"The data '{spec}' are not known. Write digits, or cifar10:FILE.parquet with a file of "
        "images (column img) and labels (column label)."
    )


def _parquet(path: Path) -> Data:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Give the parquet file with the images.")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f"Reading {path.name} needs {error.name}: pip install 'testtime[data]'."
        ) from error
    try:
        table = pq.read_table(path, columns=["img", "label"])
        encoded = table["img"].combine_chunks().field("bytes").to_pylist()
        labels = torch.tensor(table["label"].to_pylist())
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a parquet file of images and labels ({error}). It needs the columns "
            "img (a struct with the field bytes) and label."
        ) from error
    images = torch.stack([_pixels(Image.open(io.BytesIO(one)).convert("RGB")) for one in encoded])
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Data(f"cifar10 ({path.name})", images, labels, sha256)


def _pixels(image: "object") -> Tensor:
    width, height = image.size  # type: ignore[attr-defined]
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)  # type: ignore[attr-defined]
    return levels.view(height, width, 3).permute(2, 0, 1) / 255
