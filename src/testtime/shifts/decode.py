"""Encoded images, from files or bytes, to levels in a tensor."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from testtime.shifts.data import extra_data

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

# Modes of Pillow with 8 bits a channel or fewer; the others would be cut without a word.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


@dataclass(frozen=True)
class Decode:
    """How encoded images become tensors: channels first, then the size.

    Args:
        resize: pixels that the shorter side gets; the other one follows. None leaves it.
        crop: side in pixels of the square cut out of the centre. None leaves all.
        channels: 3 (RGB) or 1 (grey); every image is converted.
        interpolation: "bilinear" or "bicubic", as Pillow does it: smoothed where it shrinks.
    """

    resize: int | None = None
    crop: int | None = None
    channels: Literal[1, 3] = 3
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"Images have 1 or 3 channels, found {self.channels}; choose one.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(
                f'Unknown interpolation {self.interpolation!r}; choose "bilinear" or "bicubic".'
            )
        for what in ("resize", "crop"):
            if (pixels := getattr(self, what)) is not None and pixels < 1:
                raise ValueError(f"{what} is a number of pixels, found {pixels}; give 1 or more.")

    def __str__(self) -> str:
        steps = ["RGB" if self.channels == 3 else "grey"]
        if self.resize is not None:
            steps.append(f"shorter side {self.resize} ({self.interpolation})")
        if self.crop is not None:
            steps.append(f"centre {self.crop} x {self.crop}")
        return ", ".join(steps)

    def __call__(self, encoded: Path | bytes, name: str) -> Tensor:
        """Return the levels of one image, uint8 ``[C, H, W]``.

        Raises:
            OSError: the file cannot be opened.
            ValueError: it is no whole image of 8 bits a channel, or smaller than the crop; the
                error begins with ``name``.
        """
        with extra_data("Reading images"):
            from PIL import Image
        data = encoded.read_bytes() if isinstance(encoded, Path) else encoded
        try:
            opened = Image.open(io.BytesIO(data))
            opened.load()
        # Pillow answers damaged PNG files with a SyntaxError, and huge ones with an error of its
        # own that derives from Exception alone.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name} is not a whole image ({_short(error)}).") from error
        if opened.mode not in _MODES:
            raise ValueError(
                f"{name} has the mode {opened.mode}, more than 8 bits a channel. Convert it first."
            )
        image = opened.convert("RGB" if self.channels == 3 else "L")
        if self.resize is not None:
            image = image.resize(
                _sides(image.size, self.resize), Image.Resampling[self.interpolation.upper()]
            )
        if self.crop is not None:
            if min(image.size) < self.crop:
                raise ValueError(
                    f"{name} has {image.width} x {image.height} pixels, fewer than the crop of "
                    f"{self.crop}. Give resize as well."
                )
            left, top = (round((side - self.crop) / 2) for side in image.size)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return levels.view(image.height, image.width, self.channels).permute(2, 0, 1)


def image_files(folder: Path) -> list[Path]:
    """Return the images under a folder, relative to it, sorted; hidden ones are left out.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Give the folder with the images.")
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name).relative_to(folder)
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    if not found:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(SUFFIXES)}). Name another.")
    return sorted(found, key=Path.as_posix)


def _sides(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    width, height = size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _short(error: Exception) -> str:
    # The text of Pillow's commonest error ends with the address of a buffer, which is no use.
    return str(error).partition(" <_io")[0] or type(error).__name__
