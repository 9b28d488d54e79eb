"""Shifted data: corruptions of images and data that were read."""

from testtime.shifts.corruptions import corrupt
from testtime.shifts.data import Data
from testtime.shifts.decode import Decode
from testtime.shifts.readers import (
    read_cifar_c,
    read_folder,
    read_huggingface,
    read_imagenet,
    read_imagenet_c,
    read_npz,
    read_pairs,
    read_parquet,
)
from testtime.shifts.shift import shifted

__all__ = [
    "Data",
    "Decode",
    "corrupt",
    "read_cifar_c",
    "read_folder",
    "read_huggingface",
    "read_imagenet",
    "read_imagenet_c",
    "read_npz",
    "read_pairs",
    "read_parquet",
    "shifted",
]
