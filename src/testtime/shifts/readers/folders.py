"""Folders of images: a folder for each class, and the layouts of ImageNet's relatives."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from testtime._suggest import suggest
from testtime.shifts.data import Data
from testtime.shifts.decode import Decode, image_files
from testtime.shifts.shift import parse_shift
from testtime.shifts.wnids import WNIDS

AS_STORED = Decode()
IMAGENET = Decode(resize=256, crop=224)

# WordNet ids, and the plain numbers of ImageNet-V2's folders.
_CLASSES = {wnid: i for i, wnid in enumerate(WNIDS)} | {str(i): i for i in range(len(WNIDS))}


@dataclass(frozen=True, eq=False)
class Files:
    """Images in files, read and decoded when they are asked for."""

    folder: Path
    paths: tuple[str, ...]
    decode: Decode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: list[int], /) -> Tensor:
        names = [str(self.folder / self.paths[i]) for i in index]
        return stack([self.decode(Path(name), name) for name in names], names)


def read_folder(folder: str | Path, *, decode: Decode = AS_STORED, name: str | None = None) -> Data:
    """Read images that lie in a folder for each class; the classes are numbered in sorted order.

    >>> data = read_folder("photos/test", decode=Decode(resize=256, crop=224))  # doctest: +SKIP

    Images are read when they are asked for. Hidden files and other kinds of files are passed over;
    folders inside a class's folder belong to it.

    Args:
        folder: with ``CLASS/.../IMAGE`` below it.
        decode: size and channels of the images.
        name: what the data are called in results; the folder's name if not given.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ValueError: images lie outside the classes' folders; on reading, an image is broken or its
            size differs from that of its batch.
    """
    folder = Path(folder)
    paths = _inside_classes(folder)
    classes = sorted({path.parts[0] for path in paths})
    return _data(folder, paths, {c: i for i, c in enumerate(classes)}, decode, name, tuple(classes))


def read_imagenet(
    folder: str | Path, *, decode: Decode = IMAGENET, name: str | None = None
) -> Data:
    """Read images in folders of ImageNet classes: ImageNet-A, -R, -V2, -Sketch, or its own.

    >>> data = read_imagenet("imagenet-r")  # doctest: +SKIP

    Folders are named by WordNet ids, or by the index of the class as ImageNet-V2 does it. Labels
    are indices of the 1,000 classes. ImageNet-A and -R hold 200 of them, and their published errors
    are those of an argmax over these alone: ``data.labels.unique()``.

    Args:
        folder: with ``n01440764/IMAGE`` or ``0/IMAGE`` and so on below it.
        decode: size and channels of the images; 256 pixels for the shorter side, then the 224 in
            the centre, if not given.
        name: what the data are called in results; the folder's name if not given.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ValueError: a folder is not one of the 1,000 classes, or as in ``read_folder``.
    """
    folder = Path(folder)
    paths = _inside_classes(folder)
    found = sorted({path.parts[0] for path in paths})
    strange = [name for name in found if name not in _CLASSES]
    if strange:
        listed = ", ".join(strange[:3]) + (" ..." if len(strange) > 3 else "")
        raise ValueError(
            f"{len(strange)} of {len(found)} folders of {folder} are none of the 1,000 classes of "
            f"ImageNet: {listed}. Name the folder that holds those of the classes, or use "
            f"read_folder.{suggest(strange[0], WNIDS)}"
        )
    if len({name.isdecimal() for name in found}) > 1:
        raise ValueError(
            f"{folder} has folders of both kinds, WordNet ids and numbers ({found[0]}, "
            f"{found[-1]}). Read them apart."
        )
    return _data(folder, paths, _CLASSES, decode, name)


def read_imagenet_c(folder: str | Path, shift: str, *, decode: Decode = AS_STORED) -> Data:
    """Read one corruption and severity of ImageNet-C, as released, or as ``testtime corrupt`` does.

    >>> data = read_imagenet_c("imagenet-c", "fog:5")  # doctest: +SKIP

    The images have 224 pixels as they are stored; enlarging them to 256 and cropping again is a
    known mistake. They are read when they are asked for.

    Args:
        folder: with ``fog/5/n01440764/IMAGE`` and so on below it, or ``weather/fog/5/...`` as the
            archives unpack.
        shift: name and severity, such as ``fog:5``.
        decode: size and channels of the images; as stored, if not given.

    Raises:
        FileNotFoundError: there is no such corruption or severity.
        ValueError: the shift has no severity, or as in ``read_imagenet``.

    Source: Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions
    and perturbations", ICLR 2019; zenodo.org/records/2235448.
    """
    folder, (name, severity) = Path(folder), parse_shift(shift)
    found = {
        path.parent.name: path.parent
        for pattern in (f"*/{severity}", f"*/*/{severity}")
        for path in folder.glob(pattern)
        if path.is_dir() and not path.parent.name.isdecimal()
    }
    if name not in found:
        raise FileNotFoundError(
            f"{folder} has no {name}/{severity} (it has at this severity: "
            f"{', '.join(sorted(found)) or 'none'}).{suggest(name, found)}"
        )
    return read_imagenet(found[name] / str(severity), decode=decode, name=f"{folder.name} {shift}")


def stack(images: list[Tensor], names: list[str]) -> Tensor:
    """Put decoded images together, float32 ``[B, C, H, W]`` in [0, 1].

    Raises:
        ValueError: their sizes differ.
    """
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"{name} has {_size(image)} pixels and {names[0]} {_size(images[0])}: they don't "
                "fit into one batch. Give decode=Decode(resize=..., crop=...), or batches of 1."
            )
    return torch.stack(images) / 255


def _size(image: Tensor) -> str:
    return f"{image.shape[2]} x {image.shape[1]}"


def _inside_classes(folder: Path) -> list[Path]:
    paths = image_files(folder)
    outside = [path for path in paths if len(path.parts) == 1]
    if outside:
        raise ValueError(
            f"{len(outside)} images lie in {folder} itself, in no class: {outside[0]}. Put each "
            "into the folder of its class."
        )
    return paths


def _data(
    folder: Path,
    paths: list[Path],
    index: Mapping[str, int],
    decode: Decode,
    name: str | None,
    classes: tuple[str, ...] = (),
) -> Data:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.as_posix()}\0{(folder / path).stat().st_size}\0".encode())
    return Data(
        name or folder.resolve().name,
        Files(folder, tuple(map(str, paths)), decode),
        torch.tensor([index[path.parts[0]] for path in paths]),
        digest.hexdigest(),
        sha256_of="paths and sizes",
        order="sorted paths",
        preprocessing=str(decode),
        classes=classes,
    )
