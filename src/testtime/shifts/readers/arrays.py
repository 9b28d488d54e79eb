"""Arrays of NumPy: CIFAR-10-C and CIFAR-100-C, and any .npz."""

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from testtime._suggest import suggest
from testtime.shifts.data import Data, Samples, extra_data
from testtime.shifts.shift import parse_shift

if TYPE_CHECKING:
    import numpy as np

SEVERITIES = 5


@dataclass(frozen=True, eq=False)
class Arrays:
    """Samples out of an array, which may be a file mapped into memory.

    Bytes of 3 and 4 dimensions and floats of 4 are images: channels go first, bytes to [0, 1].
    Anything else is taken as it is.
    """

    array: "np.ndarray[Any, Any]"

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: list[int], /) -> Tensor:
        values = torch.from_numpy(self.array[index])
        if not is_images(self.array):
            return values.float()
        if values.ndim == 3:
            values = values[:, None]
        elif channels_last(self.array):
            values = values.permute(0, 3, 1, 2)
        return values / 255 if values.dtype == torch.uint8 else values.float()


def read_cifar_c(folder: str | Path, shift: str) -> Data:
    """Read one corruption and severity of CIFAR-10-C or CIFAR-100-C, as released.

    >>> data = read_cifar_c("CIFAR-10-C", "fog:5")  # doctest: +SKIP

    The folder holds a file for each corruption, uint8 ``[5 * N, 32, 32, 3]`` (N images at severity
    1, then the same at 2, and so on; N is 10,000), and ``labels.npy`` ``[5 * N]``. The file is
    mapped, not read into memory.

    Args:
        folder: with ``fog.npy`` and so on, and ``labels.npy``.
        shift: name and severity, such as ``fog:5``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the shift has no severity, or a file is damaged, short, or of another layout.
        ImportError: reading needs the extra ``data``.

    Source: Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions
    and perturbations", ICLR 2019; zenodo.org/records/2535967 and 3555552.
    """
    folder, (name, severity) = Path(folder), parse_shift(shift)
    labels_path, path = folder / "labels.npy", folder / f"{name}.npy"
    labels = _npy(labels_path)
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.npy") if file != labels_path)
        raise FileNotFoundError(
            f"{folder} has no {path.name} (it has: {', '.join(known) or 'none'})."
            f"{suggest(name, known)}"
        )
    images = _npy(path)
    if images.dtype != "uint8" or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"{path} holds {images.dtype} {list(images.shape)}, not the uint8 [5 * N, 32, 32, 3] "
            "of the release. Fetch it again, or read another layout with read_npz."
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{labels_path} holds {labels.dtype} {list(labels.shape)}, but {path.name} has "
            f"{len(images)} images. One of the two is short or of another set; fetch it again."
        )
    count, rest = divmod(len(images), SEVERITIES)
    blocks = labels[: count * SEVERITIES].reshape(SEVERITIES, count)
    if rest or (blocks != blocks[0]).any():
        raise ValueError(
            f"{labels_path} doesn't repeat the same labels for {SEVERITIES} severities, as the "
            f"release does ({len(labels)} labels). Fetch it again."
        )
    rows = slice((severity - 1) * count, severity * count)
    return Data(
        f"{folder.name} {shift}",
        Arrays(images[rows]),
        torch.from_numpy(blocks[0].astype("int64")),
        sha256_of(images[rows], labels[rows]),
        sha256_of="values",
    )


def read_npz(
    path: str | Path,
    *,
    x: str,
    y: str,
    groups: str | None = None,
    timestamps: str | None = None,
    name: str | None = None,
) -> Data:
    """Read arrays of an .npz file: images, signals or rows of a table.

    >>> ecg = read_npz("mitbih.npz", x="beats", y="label", groups="patient")  # doctest: +SKIP

    Args:
        path: the file.
        x: the array of samples. uint8 ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``, and
            floats in [0, 1] of the last two shapes, with 1 or 3 channels, are images. Anything else
            is taken as it is, as float32.
        y: the array of labels ``[N]``, integers.
        groups: the array of patients, places ... ``[N]``, integers.
        timestamps: the array of seconds ``[N]``.
        name: what the data are called in results; the file's name if not given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or an array is missing or not what it should be.
        ImportError: reading needs the extra ``data``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Give the .npz file with the arrays.")
    with extra_data(f"Reading {path.name}"):
        import numpy as np
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    wanted = {"x": x, "y": y, "groups": groups, "timestamps": timestamps}
    try:
        # NumPy leaves a damaged file open that it has opened itself.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            for what, key in wanted.items():
                if key is not None and key in file:
                    arrays[what] = file[key]
            known = list(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a whole .npz file ({error}). Fetch it again.") from error
    for what, key in wanted.items():
        if key is not None and what not in arrays:
            raise ValueError(
                f"{path} has no array '{key}' for {what} (it has: {', '.join(known)})."
                f"{suggest(key, known)}"
            )
    where = f"{path}, array {x}"
    return assemble(
        samples_of(arrays["x"], where),
        arrays,
        str(path),
        name=name or path.name,
        sha256=sha256_of(arrays["x"], arrays["y"]),
    )


def samples_of(x: "np.ndarray[Any, Any]", where: str) -> Arrays:
    """Check an array of samples.

    Raises:
        ValueError: they are no numbers, not finite, or images outside [0, 1].
    """
    import numpy as np

    if x.ndim == 0 or x.dtype.kind not in "biuf":
        raise ValueError(f"{where}: the samples are {x.dtype} {list(x.shape)}. Give numbers.")
    if x.dtype.kind == "f":
        if bad := int((~np.isfinite(x)).sum()):
            raise ValueError(
                f"{where}: {bad} values are NaN or infinite. Fill or leave out those rows."
            )
        if is_images(x) and x.size and (x.min() < 0 or x.max() > 1):
            raise ValueError(
                f"{where}: the images are floats from {x.min():.4g} to {x.max():.4g}. Give them in "
                "[0, 1] (not normalised), or as uint8."
            )
    return Arrays(x)


def assemble(
    samples: Samples,
    arrays: "Mapping[str, np.ndarray[Any, Any]]",
    where: str,
    *,
    name: str,
    sha256: str,
    sha256_of: str = "values",
    preprocessing: str = "none",
) -> Data:
    """Put samples and the arrays beside them together: y, and groups and timestamps if there.

    Raises:
        ValueError: labels or groups are no integers, or their number differs from the samples'.
    """
    integers = {}
    for what in arrays.keys() & {"y", "groups"}:
        if arrays[what].dtype.kind not in "iu":
            raise ValueError(
                f"{where}: {'the labels' if what == 'y' else what} are {arrays[what].dtype}. Give "
                "integers."
            )
        integers[what] = torch.from_numpy(arrays[what].astype("int64"))
    seconds = arrays.get("timestamps")
    return Data(
        name,
        samples,
        integers["y"],
        sha256,
        sha256_of=sha256_of,
        preprocessing=preprocessing,
        groups=integers.get("groups"),
        timestamps=None if seconds is None else torch.from_numpy(seconds.astype("float64")),
    )


def is_images(x: "np.ndarray[Any, Any]") -> bool:
    """Whether an array holds images, by type and shape; see ``Arrays``."""
    if x.ndim == 4 and (x.dtype == "uint8" or x.dtype.kind == "f"):
        return x.shape[1] in (1, 3) or x.shape[3] in (1, 3)
    return x.ndim == 3 and x.dtype == "uint8"


def channels_last(x: "np.ndarray[Any, Any]") -> bool:
    """Whether the channels of images ``[N, ., ., .]`` are the last dimension."""
    return x.shape[1] not in (1, 3)


def _npy(path: Path) -> "np.ndarray[Any, Any]":
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}. Give the folder of the release, with labels.npy in it."
        )
    with extra_data(f"Reading {path.name}"):
        import numpy as np
    try:
        array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged, or shorter than its header says ({error}). Fetch it again."
        ) from error
    return array


def sha256_of(*arrays: "np.ndarray[Any, Any]") -> str:
    """Return the hash of types, shapes and values."""
    import numpy as np

    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
