"""Textures for frost: the authors' photographs where they are installed, made ones where not."""

import functools
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

PACKAGES = ("imgcorr", "imagecorruptions")
MADE = "procedural"

# The published code draws from the first five of six.
FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")


@dataclass(frozen=True)
class Sheet:
    """Textures of several sizes, one after another.

    Levels are ``[3, N]``; of each texture there are where it starts, its height and width, ``[5]``.
    """

    levels: Tensor
    starts: Tensor
    heights: Tensor
    widths: Tensor


def find_textures(wanted: str | None = None) -> str:
    """Return where the textures come from: a package, "procedural" or a folder.

    Args:
        wanted: a package of ``PACKAGES``, "procedural", or a folder with ``FILES``. If not given,
            the first package that is installed and readable, else "procedural".

    Raises:
        FileNotFoundError: the package or folder that was asked for does not hold the files.
        ImportError: files were asked for, and pillow, which reads them, is not installed.
    """
    if wanted == MADE:
        return MADE
    if wanted is None:
        found = (package for package in PACKAGES if _folder(package))
        return next(found, MADE) if find_spec("PIL") else MADE
    folder = _folder(wanted) if wanted in PACKAGES else Path(wanted)
    missing = [file for file in FILES if not folder or not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"'{wanted}' holds no {', '.join(missing)} for frost. Install one of "
            f"{', '.join(PACKAGES)}, name a folder with {', '.join(FILES)}, or ask for "
            f'"{MADE}" textures.'
        )
    if not find_spec("PIL"):
        raise ImportError("Reading frost's textures needs pillow: pip install 'testtime[data]'.")
    return wanted


def _folder(package: str) -> Path | None:
    spec = find_spec(package)  # finds it without importing it
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "frost"
    return folder if all((folder / file).is_file() for file in FILES) else None


def textures_for(
    wanted: str | None, shrink: int, height: int, width: int, device: torch.device
) -> Sheet:
    """Return the textures, shrunk, and enlarged where images of that size need it."""
    return _sheet(find_textures(wanted), shrink, height, width, device)


@functools.lru_cache(maxsize=8)
def _sheet(source: str, shrink: int, height: int, width: int, device: torch.device) -> Sheet:
    # Every fifth pixel from the third on: what bilinear sampling of the file at a fifth comes to.
    textures = [
        _enlarge(texture[:, shrink // 2 :: shrink, shrink // 2 :: shrink], height, width)
        for texture in _textures(source)
    ]
    sizes = torch.tensor([texture.shape[1:] for texture in textures])
    ends = sizes.prod(1).cumsum(0)
    return Sheet(
        levels=torch.cat([texture.flatten(1) for texture in textures], dim=1).to(device),
        starts=(ends - sizes.prod(1)).to(device),
        heights=sizes[:, 0].to(device),
        widths=sizes[:, 1].to(device),
    )


def _enlarge(texture: Tensor, height: int, width: int) -> Tensor:
    """Return a texture that is larger than an image; the published code knows no such images."""
    factor = max((height + 1) / texture.shape[1], (width + 1) / texture.shape[2])
    if factor <= 1:
        return texture
    size = [math.ceil(side * factor) for side in texture.shape[1:]]
    return F.interpolate(texture[None].float(), size=size, mode="bilinear")[0].round().byte()


@functools.lru_cache(maxsize=2)
def _textures(source: str) -> tuple[Tensor, ...]:
    """Return the textures [3, h, w], 8-bit levels."""
    if source == MADE:
        return tuple(_make(*look, seed=seed) for seed, look in enumerate(_LOOKS))
    from PIL import Image

    folder = _folder(source) or Path(source)
    textures = []
    for file in FILES:
        with Image.open(folder / file) as image:
            rgb = image.convert("RGB")
        levels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
        textures.append(levels.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous())
    return tuple(textures)


# Mean and standard deviation of red, green and blue in [0, 1], and how fast the power falls with
# frequency: near to what the authors' five photographs have.
_LOOKS = (
    ((0.30, 0.58, 0.65), (0.095, 0.06, 0.055), 1.05),
    ((0.78, 0.79, 0.83), (0.08, 0.083, 0.086), 1.0),
    ((0.78, 0.79, 0.83), (0.08, 0.083, 0.086), 1.0),
    ((0.56, 0.62, 0.67), (0.105, 0.105, 0.11), 0.75),
    ((0.40, 0.445, 0.49), (0.145, 0.14, 0.14), 0.95),
)


def _make(mean: tuple[float, ...], deviation: tuple[float, ...], slope: float, seed: int) -> Tensor:
    """Make a texture of ice, 450 x 600: noise stronger at low frequencies, folded to ridges."""
    generator = torch.Generator().manual_seed(seed)
    height, width = 450, 600
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    frequency[0, 0] = 1
    noise = torch.fft.rfft2(torch.randn(2, height, width, generator=generator))
    clouds, folds = torch.fft.irfft2(noise * frequency**-slope, s=(height, width))
    ice = clouds / clouds.std() - (folds / folds.std()).abs()
    ice = (ice - ice.mean()) / ice.std()
    colours = torch.tensor(mean)[:, None, None] + torch.tensor(deviation)[:, None, None] * ice
    levels: Tensor = (255 * colours.clamp(0, 1)).round()
    return levels.byte()
