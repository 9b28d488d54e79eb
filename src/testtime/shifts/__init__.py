"""Shifted data: corruptions of images, data that were read, and streams of them."""

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
from testtime.shifts.stream import Batch, Stream, load_stream
from testtime.shifts.streams import continual, gradual, mixed, natural, repeating, single, slow

__all__ = [
    "Batch",
    "Data",
    "Decode",
    "Stream",
    "continual",
    "corrupt",
    "gradual",
    "load_stream",
    "mixed",
    "natural",
    "read_cifar_c",
    "read_folder",
    "read_huggingface",
    "read_imagenet",
    "read_imagenet_c",
    "read_npz",
    "read_pairs",
    "read_parquet",
    "repeating",
    "shifted",
    "single",
    "slow",
]
