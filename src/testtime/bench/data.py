"""Data by specification: ``KIND:PATH:setting=value``."""

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from testtime._suggest import suggest
from testtime.shifts import (
    Data,
    Decode,
    read_cifar_c,
    read_folder,
    read_imagenet,
    read_imagenet_c,
    read_npz,
    read_parquet,
)


@dataclass(frozen=True)
class Released:
    """A benchmark that was released corrupted: data for each shift, read when they are asked for.

    Args:
        name: what it is called in results.
        at: from a shift, such as ``fog:5``, to its data.
    """

    name: str
    at: Callable[[str], Data]


def _digits() -> Data:
    from testtime import demo

    images, labels = demo.digits("test")
    return Data(demo.SPLIT, images, labels, demo.sha256())


def _cifar10(path: str) -> Data:
    data = read_parquet(path, x="img")
    return replace(data, name=f"cifar10 ({data.name})").load()


def _released(read: Callable[..., Data], name: str, path: str, **settings: Any) -> Released:
    return Released(f"{name} ({path})", partial(read, path, **settings))


KINDS: dict[str, Callable[..., Data | Released]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar10-c": partial(_released, read_cifar_c, "CIFAR-10-C"),
    "cifar100-c": partial(_released, read_cifar_c, "CIFAR-100-C"),
    "imagenet-c": partial(_released, read_imagenet_c, "ImageNet-C"),
    "imagenet": read_imagenet,
    "folder": read_folder,
    "parquet": read_parquet,
    "npz": read_npz,
}
FORMS = (
    "digits; cifar10:FILE.parquet; cifar10-c:FOLDER and cifar100-c:FOLDER (.npy files); "
    "imagenet-c:FOLDER; imagenet:FOLDER (folders of WordNet ids: ImageNet-A, -R, -V2, -Sketch); "
    "folder:FOLDER (a folder a class); parquet:FILE:x=COLUMN:y=COLUMN; npz:FILE:x=NAME:y=NAME; for "
    "images on disk also resize=256:crop=224"
)


def load_data(spec: str) -> Data | Released:
    """Return labelled samples by their specification.

    Args:
        spec: a key of ``KINDS``, a path, and settings of its reader, with colons between.

    Raises:
        ValueError, FileNotFoundError: what was wrong, and what would do.
        ImportError: the reader needs the extra ``data``.
    """
    kind, *parts = spec.split(":")
    if kind not in KINDS:
        raise ValueError(f"The data '{spec}' are not known. Write {FORMS}.{suggest(kind, KINDS)}")
    settings = dict(part.partition("=")[::2] for part in parts if "=" in part)
    values = {key: _value(text) for key, text in settings.items()}
    shape = {key: values.pop(key) for key in ("resize", "crop") if key in values}
    if shape:
        values["decode"] = Decode(**shape)
    try:
        return KINDS[kind](*(part for part in parts if "=" not in part), **values)
    except TypeError as error:
        raise ValueError(f"The data '{spec}' cannot be read: {error}. Write {FORMS}.") from error


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
