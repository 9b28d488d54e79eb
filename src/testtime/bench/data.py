"""Labelled images by name."""

from dataclasses import replace

from testtime.shifts import Data, read_parquet

__all__ = ["Data", "load_data"]


def load_data(spec: str) -> Data:
    """Return labelled images by their specification, all in memory.

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
        data = read_parquet(path, x="img")
        return replace(data, name=f"cifar10 ({data.name})").load()
    raise ValueError(
        f"The data '{spec}' are not known. Write digits, or cifar10:FILE.parquet with a file of "
        "images (column img) and labels (column label)."
    )
