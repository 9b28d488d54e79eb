"""The field's common image corruptions in five severities, batched in torch.

For each there are a function ``NAME(x, *constants, *draws)`` that is the corruption, a row in
``CONSTANTS`` and, where chance plays a part, a function ``draw_NAME(x, *constants, generator)``.
Draws are apart so that recorded ones can be put in.

The published data sets hold 8-bit levels, cut towards zero, and those of ImageNet-C were saved as
JPEG besides: ``cut`` and ``jpeg`` do the same. Without them motion blur, pixelate and JPEG give
levels, and the others continuous values.

Source: Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and
perturbations", ICLR 2019; github.com/hendrycks/robustness at 8190fe3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testtime._suggest import suggest
from testtime.shifts.corruptions import blur, digital, filters, jpeg, noise, spatter, weather
from testtime.shifts.corruptions.constants import (
    CONSTANTS,
    CORRUPTIONS,
    EXTRA,
    STANDARD,
    Table,
)
from testtime.shifts.corruptions.textures import find_textures

__all__ = [
    "CONSTANTS",
    "CORRUPTIONS",
    "EXTRA",
    "IMAGENET_SIDE",
    "SMALLEST_SIDE",
    "STANDARD",
    "Corruption",
    "Table",
    "apply",
    "corrupt",
    "draw",
]

# Images whose shorter side has this many pixels or more take the constants made for 224 pixels.
IMAGENET_SIDE = 128

# Reflected borders and the widest disk need this many pixels.
SMALLEST_SIDE = 16

# Quality of the JPEG files that ImageNet-C was published as.
JPEG_QUALITY = 85

Generators = torch.Generator | Sequence[torch.Generator] | None

# The dimension of draws that goes over the images, where it is not the first.
_IMAGES = {"fog": 1}

_MODULES = (noise, blur, weather, digital, jpeg, spatter)


def _functions(prefix: str) -> dict[str, Callable[..., Any]]:
    return {
        name: function
        for name in CORRUPTIONS
        for module in _MODULES
        if (function := vars(module).get(prefix + name)) and function.__module__ == module.__name__
    }


_APPLY, _DRAW = _functions(""), _functions("draw_")


@dataclass(frozen=True)
class Corruption:
    """One corruption at one severity, as a transform that can be pickled.

    >>> foggy = Corruption("fog", 3)(torch.rand(3, 32, 32))

    Args:
        name: a key of ``CORRUPTIONS``, which says what each is.
        severity: 1 (mild) to 5 (severe).
        table: whose constants to use: "cifar" (made for 32 pixels) or "imagenet" (for 224). If not
            given, images take those of ImageNet from ``IMAGENET_SIDE`` pixels on, shorter side.
        cut: give 8-bit levels, cut towards zero as in CIFAR-10-C; else the values are continuous.
        jpeg: cut, then save as JPEG of quality 85 and read again, as in ImageNet-C.
        textures: for frost: "imgcorr" or "imagecorruptions" (the files of that package), a folder
            with them, or "procedural". If not given, whichever of the packages is installed, else
            procedural; ``record`` says which.

    Raises:
        ValueError: the name, the severity or the table is not known, or textures are given for
            another corruption than frost.
        FileNotFoundError, ImportError: the textures that were asked for cannot be read.
    """

    name: str
    severity: int
    table: Table | None = None
    cut: bool = False
    jpeg: bool = False
    textures: str | None = None

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            raise ValueError(
                f"There is no corruption '{self.name}' (known: {', '.join(CORRUPTIONS)})."
                f"{suggest(str(self.name), CORRUPTIONS)}"
            )
        if self.severity not in range(1, 6):
            raise ValueError(
                f"Severity goes from 1 to 5, found {self.severity!r}; choose one of these."
            )
        if self.table not in (None, "cifar", "imagenet"):
            raise ValueError(f'Unknown table {self.table!r}; choose "cifar" or "imagenet".')
        if self.textures is not None:
            if self.name != "frost":
                raise ValueError(
                    f"Textures are for frost alone, found textures={self.textures!r} with "
                    f"{self.name}; leave them out."
                )
            find_textures(self.textures)

    def __call__(self, x: Tensor, generator: Generators = None, *, check: bool = True) -> Tensor:
        """Return corrupted images ``[B, 3, H, W]``, or one ``[3, H, W]``; see ``corrupt``."""
        if x.ndim == 3:
            return self(x[None], generator, check=check)[0]
        _check_images(x, generator, values=check)
        # Half precision has fewer steps than 8-bit images have levels.
        images = x if x.dtype == torch.float64 else x.float()
        constants = self._constants(*x.shape[-2:])
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            options = {"textures": self.textures} if self.name == "frost" else {}
            draws = draw(self.name, images, constants, generator, **options)
            corrupted = apply(self.name, images, constants, draws)
            if self.cut or self.jpeg:
                corrupted = filters.cut(corrupted).div_(255)
            if self.jpeg:
                corrupted = jpeg.jpeg_compression(corrupted, JPEG_QUALITY)
        return corrupted.to(x.dtype)

    def record(self, height: int, width: int) -> dict[str, Any]:
        """Return how images of that size are made, as values that JSON can hold.

        For frost ``textures`` says where they came from: "procedural" ones are not the published
        corruption.
        """
        record: dict[str, Any] = {
            "corruption": self.name,
            "severity": int(self.severity),
            "table": self._table(height, width),
            "constants": list(self._constants(height, width)),
            "cut": self.cut or self.jpeg,
            "jpeg": JPEG_QUALITY if self.jpeg else None,
        }
        if self.name == "frost":
            record["textures"] = find_textures(self.textures)
        return record

    def _table(self, height: int, width: int) -> Table:
        if self.table is not None:
            return self.table
        return "imagenet" if min(height, width) >= IMAGENET_SIDE else "cifar"

    def _constants(self, height: int, width: int) -> tuple[float, ...]:
        return CONSTANTS[self.name][self._table(height, width)][int(self.severity) - 1]


def corrupt(
    x: Tensor,
    name: str,
    severity: int,
    *,
    generator: Generators = None,
    table: Table | None = None,
    cut: bool = False,
    jpeg: bool = False,
    textures: str | None = None,
    check: bool = True,
) -> Tensor:
    """Corrupt a batch of images; every image has draws of its own.

    >>> images = torch.rand(8, 3, 32, 32)
    >>> foggy = corrupt(images, "fog", 5, generator=torch.Generator().manual_seed(0))

    Args:
        x: images [B, 3, H, W] in [0, 1], any float dtype, H and W at least 16 pixels.
        name: the corruption, a key of ``CORRUPTIONS``.
        severity: 1 (mild) to 5 (severe).
        generator: source of the draws, on the images' device, or one for each image, so that its
            draws do not depend on its batch; torch's global one if not given.
        table: whose constants to use, see ``Corruption``; by the size of the images if not given.
        cut: give 8-bit levels, cut towards zero, as in CIFAR-10-C.
        jpeg: cut, then save as JPEG of quality 85 and read again, as in ImageNet-C.
        textures: where those of frost come from, see ``Corruption``.
        check: look whether all values are in [0, 1]; on a GPU the host waits for that, and for
            nothing else here.

    Returns:
        Images of the same shape, dtype and device, in [0, 1], without gradients.

    Raises:
        TypeError: the images are not of a float dtype.
        ValueError: name, severity or table is unknown, the images have another shape or range,
            or the generator is on another device.
    """
    corruption = Corruption(name, severity, table, cut, jpeg, textures)
    if x.ndim == 3:
        raise ValueError(_shape_error(x))
    return corruption(x, generator, check=check)


def draw(
    name: str,
    x: Tensor,
    constants: tuple[float, ...],
    generator: Generators = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return the draws that a corruption of these images needs, none for a deterministic one."""
    if isinstance(generator, Sequence):
        own = [
            draw(name, i[None], constants, g, **options) for i, g in zip(x, generator, strict=True)
        ]
        return tuple(torch.cat(parts, _IMAGES.get(name, 0)) for parts in zip(*own, strict=True))
    return _DRAW[name](x, *constants, generator=generator, **options) if name in _DRAW else ()


def apply(
    name: str, x: Tensor, constants: tuple[float, ...], draws: tuple[Tensor, ...] = ()
) -> Tensor:
    """Return the images corrupted by these draws: continuous values, nothing checked."""
    result: Tensor = _APPLY[name](x, *constants, *draws)
    return result


def _shape_error(x: Tensor) -> str:
    return (
        f"Corruptions take images [B, 3, H, W] with B at least 1 and H and W at least "
        f"{SMALLEST_SIDE}, found {list(x.shape)}; permute, enlarge or convert them to RGB."
    )


def _check_images(x: Tensor, generator: Generators, values: bool) -> None:
    if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < SMALLEST_SIDE or not len(x):
        raise ValueError(_shape_error(x))
    if not x.is_floating_point():
        raise TypeError(
            f"Corruptions take float images in [0, 1], found {x.dtype}; divide 8-bit images by 255."
        )
    first = generator[0] if isinstance(generator, Sequence) else generator
    if first is not None and first.device.type != x.device.type:
        raise ValueError(
            f"The images are on {x.device} but the generator is on {first.device}; "
            f"make it with torch.Generator({str(x.device)!r})."
        )
    if not values:
        return
    low, high = torch.stack(x.aminmax()).tolist()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"Corruptions take images in [0, 1], found values from {low:.4g} to {high:.4g}; "
            "corrupt before normalising, and divide 8-bit images by 255."
        )
