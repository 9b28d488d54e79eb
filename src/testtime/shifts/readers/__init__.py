"""Readers of data sets, each to ``Data``: what is read is checked, and named in results."""

from testtime.shifts.readers.arrays import read_cifar_c, read_npz
from testtime.shifts.readers.folders import read_folder, read_imagenet, read_imagenet_c
from testtime.shifts.readers.pairs import read_pairs
from testtime.shifts.readers.tables import read_huggingface, read_parquet

__all__ = [
    "read_cifar_c",
    "read_folder",
    "read_huggingface",
    "read_imagenet",
    "read_imagenet_c",
    "read_npz",
    "read_pairs",
    "read_parquet",
]
