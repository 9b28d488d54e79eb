"""Common image corruptions in five severities, as in CIFAR-10-C and ImageNet-C, batched in torch.

For each corruption there are a function ``NAME(x, *constants, *draws)`` that is the corruption, a
row in ``CONSTANTS`` and, where chance plays a part, a function ``draw_NAME(x, *constants,
generator)``. Draws are apart so that recorded ones can be put in.

Results are continuous. The published data sets hold 8-bit levels, cut towards zero, and those of
ImageNet-C were saved as JPEG besides; neither is done here.

Source: Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and
perturbations", ICLR 2019; constants of github.com/hendrycks/robustness at 8190fe3.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime._suggest import suggest

Table = Literal["cifar", "imagenet"]

# Images whose shorter side has this many pixels or more take the constants made for 224 pixels.
IMAGENET_SIDE = 128

# Reflected borders and the widest disk need this many pixels.
SMALLEST_SIDE = 16

# Severity 1 to 5. Each entry holds the arguments of the corruption's function.
CONSTANTS: dict[str, dict[Table, tuple[tuple[float, ...], ...]]] = {
    "gaussian_noise": {
        "cifar": ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
        "imagenet": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    },
    "defocus_blur": {
        "cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "imagenet": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    },
    "fog": {
        "cifar": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "imagenet": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    },
    "contrast": {
        "cifar": ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
        "imagenet": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    },
}


def corrupt(
    x: Tensor,
    name: str,
    severity: int,
    *,
    generator: torch.Generator | None = None,
    table: Table | None = None,
) -> Tensor:
    """Corrupt a batch of images; every image has draws of its own.

    >>> images = torch.rand(8, 3, 32, 32)
    >>> foggy = corrupt(images, "fog", 5, generator=torch.Generator().manual_seed(0))

    Args:
        x: images [B, 3, H, W] in [0, 1], any float dtype, H and W at least 16 pixels.
        name: the corruption, a key of ``CONSTANTS``.
        severity: 1 (mild) to 5 (severe).
        generator: source of the draws, on the images' device; torch's global one if not given.
        table: whose constants to use: "cifar" (made for 32 pixels) or "imagenet" (for 224). If not
            given, images take those of ImageNet from ``IMAGENET_SIDE`` pixels on.

    Returns:
        Images of the same shape, dtype and device, in [0, 1], not rounded to 8-bit levels.

    Raises:
        TypeError: the images are not of a float dtype.
        ValueError: name, severity or table is unknown, the images have another shape or range,
            or the generator is on another device.
    """
    if name not in CONSTANTS:
        raise ValueError(
            f"There is no corruption '{name}' (known: {', '.join(CONSTANTS)})."
            f"{suggest(name, CONSTANTS)}"
        )
    if severity not in range(1, 6):
        raise ValueError(f"Severity goes from 1 to 5, found {severity!r}; choose one of these.")
    if generator is not None and generator.device.type != x.device.type:
        raise ValueError(
            f"The images are on {x.device} but the generator is on {generator.device}; "
            f"make it with torch.Generator({str(x.device)!r})."
        )
    _check_images(x)
    if table is None:
        table = "imagenet" if min(x.shape[-2:]) >= IMAGENET_SIDE else "cifar"
    if table not in CONSTANTS[name]:
        raise ValueError(f'Unknown table {table!r}; choose "cifar" or "imagenet".')
    constants = CONSTANTS[name][table][int(severity) - 1]
    # Half precision has fewer steps than 8-bit images have levels.
    images = x if x.dtype == torch.float64 else x.float()
    draws = _DRAW[name](images, *constants, generator) if name in _DRAW else ()
    return _APPLY[name](images, *constants, *draws).to(x.dtype)


def draw_gaussian_noise(
    x: Tensor, sigma: float, generator: torch.Generator | None
) -> tuple[Tensor, ...]:
    """Draw a standard normal for each value of x."""
    return (torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype),)


def gaussian_noise(x: Tensor, sigma: float, normals: Tensor) -> Tensor:
    """Add noise of standard deviation sigma; normals has the shape of x."""
    return (x + sigma * normals).clamp(0, 1)


def defocus_blur(x: Tensor, radius: float, alias_sigma: float) -> Tensor:
    """Spread each pixel over a disk of that radius in pixels, its edge smoothed by a Gaussian."""
    return _correlate(x, disk(radius, alias_sigma).to(x)).clamp(0, 1)


def disk(radius: float, alias_sigma: float) -> Tensor:
    """Compute the kernel of defocus_blur, float64, 17 x 17 or the diameter of a larger disk.

    With radius 8 and 10 the disk touches the border, and the reflection there lifts the sum of the
    kernel to 1.01. It stays so, as the published images are that bit brighter.
    """
    reach, support = (8, 1) if radius <= 8 else (int(radius), 2)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    inside = (offsets[:, None] ** 2 + offsets**2 <= radius**2).double()
    taps = torch.arange(-support, support + 1, dtype=torch.float64)
    gauss = torch.exp(-(taps**2) / (2 * alias_sigma**2))
    gauss = gauss / gauss.sum()
    return _correlate((inside / inside.sum())[None, None], torch.outer(gauss, gauss))[0, 0]


def draw_fog(
    x: Tensor, amount: float, decay: float, generator: torch.Generator | None
) -> tuple[Tensor, ...]:
    """Draw uniforms in (-1, 1) for the plasma maps, coarse to fine.

    One array [3, B, n, n] for each of n = 1, 2, 4, ... up to half the side of the map: centres of
    the squares, then both kinds of diamonds. The side is the next power of two that holds an image.
    """
    draws = []
    n = 1
    while n < max(x.shape[-2:]):
        u = torch.rand(3, len(x), n, n, generator=generator, device=x.device, dtype=x.dtype)
        draws.append(2 * u - 1)
        n *= 2
    return tuple(draws)


def fog(x: Tensor, amount: float, decay: float, *uniforms: Tensor) -> Tensor:
    """Mix in a plasma map, and darken until the brightest value of the image is what it was."""
    height, width = x.shape[-2:]
    haze = plasma(decay, *uniforms)[:, None, :height, :width]
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    return ((x + amount * haze) * brightest / (brightest + amount)).clamp(0, 1)


def plasma(decay: float, *uniforms: Tensor) -> Tensor:
    """Build maps [B, S, S] that span [0, 1] from the draws of fog: diamond-square on a torus.

    Each level halves the step between the points known. It displaces the new ones by up to the
    square of a scale that starts at 100 and is divided by decay.
    """
    points = torch.zeros_like(uniforms[0][0])
    scale = 100.0
    for at_centres, at_rights, at_belows in uniforms:
        right, below = points.roll(-1, dims=2), points.roll(-1, dims=1)
        corners = points + right + below + right.roll(-1, dims=1)
        centres = corners / 4 + scale**2 * at_centres
        above, left = centres.roll(1, dims=1), centres.roll(1, dims=2)
        rights = (points + right + centres + above) / 4 + scale**2 * at_rights
        belows = (points + below + centres + left) / 4 + scale**2 * at_belows
        even_rows = torch.stack([points, rights], dim=3).flatten(2)
        odd_rows = torch.stack([belows, centres], dim=3).flatten(2)
        points = torch.stack([even_rows, odd_rows], dim=2).flatten(1, 2)
        scale /= decay
    points = points - points.amin(dim=(1, 2), keepdim=True)
    return points / points.amax(dim=(1, 2), keepdim=True)


def contrast(x: Tensor, factor: float) -> Tensor:
    """Pull every value towards the mean of its channel; the distance shrinks by that factor."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    return ((x - mean) * factor + mean).clamp(0, 1)


_APPLY: dict[str, Callable[..., Tensor]] = {
    "gaussian_noise": gaussian_noise,
    "defocus_blur": defocus_blur,
    "fog": fog,
    "contrast": contrast,
}
_DRAW: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "gaussian_noise": draw_gaussian_noise,
    "fog": draw_fog,
}


def _correlate(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlate [B, C, H, W] with an odd square kernel; the border reflects, edge not repeated."""
    height, width = x.shape[-2:]
    reach = len(kernel) // 2
    padded = F.pad(x, [reach] * 4, mode="reflect")
    # Through the spectrum: 17 x 17 taps and more take ten times as long one by one.
    size = [height + 2 * reach, width + 2 * reach]
    product = torch.fft.rfft2(padded) * torch.fft.rfft2(kernel, s=size).conj()
    correlated: Tensor = torch.fft.irfft2(product, s=size)
    return correlated[..., :height, :width]


def _check_images(x: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < SMALLEST_SIDE:
        raise ValueError(
            f"Corruptions take images [B, 3, H, W] with H and W at least {SMALLEST_SIDE}, found "
            f"{list(x.shape)}; permute or enlarge them."
        )
    if not x.is_floating_point():
        raise TypeError(
            f"Corruptions take float images in [0, 1], found {x.dtype}; divide 8-bit images by 255."
        )
    if not ((x >= 0) & (x <= 1)).all():
        low, high = x.aminmax()
        raise ValueError(
            f"Corruptions take images in [0, 1], found values from {low:.4g} to {high:.4g}; "
            "corrupt before normalising, and divide 8-bit images by 255."
        )
