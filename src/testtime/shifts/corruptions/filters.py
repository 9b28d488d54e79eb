"""Filters that several corruptions share, batched: images ``[B, C, H, W]`` in and out."""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LUMINANCE = (0.299, 0.587, 0.114)

# Filters have two equal forms; images of this side at most take the one that is faster for them.
FEW_PIXELS = 64


def cut(x: Tensor) -> Tensor:
    """Return the 8-bit levels of values in [0, 1], cut towards zero as a C cast does, as floats.

    A value that stands for a whole level may lie a rounding error below it; a ten-thousandth of a
    level is added, which is more than such errors and less than any weight in use.
    """
    return (255 * x + 1e-4).floor_().clamp_(0, 255)


def gaussian_filter(
    x: Tensor, sigma: float, *, truncate: float = 4, border: str = "nearest"
) -> Tensor:
    """Blur by a Gaussian of that standard deviation in pixels, along rows and columns.

    Args:
        x: images ``[..., H, W]``.
        sigma: standard deviation in pixels.
        truncate: the taps reach that many standard deviations, rounded to whole pixels.
        border: "nearest" repeats the last pixel, "reflect" mirrors behind it.
    """
    height, width = x.shape[-2:]
    # Few taps are faster one by one; many, or on few pixels, as a matrix.
    if min(height, width) > FEW_PIXELS and truncate * sigma < 13:
        return _gaussian_by_taps(x, sigma, truncate, border)
    down = _gaussian_matrix(sigma, height, truncate, border).to(x)
    across = _gaussian_matrix(sigma, width, truncate, border).to(x)
    return down @ x @ across.T


def _gaussian_taps(sigma: float, truncate: float) -> Tensor:
    reach = int(truncate * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    taps = torch.exp(-(offsets**2) / (2 * sigma**2))
    return taps / taps.sum()


def _gaussian_by_taps(x: Tensor, sigma: float, truncate: float, border: str) -> Tensor:
    taps = _gaussian_taps(sigma, truncate).tolist()
    reach = len(taps) // 2
    for dim in (-2, -1):
        side = x.shape[dim]
        if border == "nearest":
            sizes = [reach if d == x.ndim + dim else -1 for d in range(x.ndim)]
            before, after = x.narrow(dim, 0, 1).expand(sizes), x.narrow(dim, -1, 1).expand(sizes)
        else:
            before, after = (
                x.narrow(dim, 0, reach).flip(dim),
                x.narrow(dim, -reach, reach).flip(dim),
            )
        padded = torch.cat([before, x, after], dim=dim)
        del x, before, after
        x = taps[0] * padded.narrow(dim, 0, side)
        for i, tap in enumerate(taps[1:], 1):
            x.add_(padded.narrow(dim, i, side), alpha=tap)
        del padded
    return x


@functools.lru_cache(maxsize=64)
def _gaussian_matrix(sigma: float, side: int, truncate: float, border: str) -> Tensor:
    """Return the filter along one side as a matrix, float64; row i makes output i."""
    taps = _gaussian_taps(sigma, truncate)
    reach = len(taps) // 2
    pixels = torch.arange(side)[:, None] + torch.arange(-reach, reach + 1)
    if border == "nearest":
        pixels = pixels.clamp(0, side - 1)
    else:  # the pattern d c b a | a b c d | d c b a has the period 2 * side
        pixels = pixels % (2 * side)
        pixels = torch.minimum(pixels, 2 * side - 1 - pixels)
    weights = torch.zeros(side, side, dtype=torch.float64)
    return weights.scatter_add_(1, pixels, taps.expand(side, -1))


def motion_filter(x: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """Smear each image along a line that begins at the pixel itself.

    The motion blur of ImageMagick: taps ``exp(-i²/2σ²)`` for i from 0 to twice the radius, to the
    nearest pixels along the angle; the last pixel repeats beyond the border. It is kept in 16 bits
    and cut to 8.

    Args:
        x: images ``[B, C, H, W]`` on whole levels.
        radius: half the length, in pixels.
        sigma: standard deviation of the taps, in pixels.
        degrees: the angle of each image ``[B]``, 0 to the right, 90 downwards.
    """
    reach = 2 * math.ceil(radius)
    steps = torch.arange(reach + 1, device=x.device, dtype=degrees.dtype)
    taps = torch.exp(-(steps**2) / (2 * sigma**2))
    taps = (taps / taps.sum()).to(x)
    angle = torch.deg2rad(degrees)[:, None]
    down = torch.ceil(steps * angle.sin() - 0.5).long()
    across = torch.ceil(steps * angle.cos() - 0.5).long()
    if min(x.shape[-2:]) > FEW_PIXELS:
        kernels = x.new_zeros(len(x), (2 * reach + 1) ** 2)
        places = (reach + down) * (2 * reach + 1) + reach + across
        kernels.scatter_add_(1, places, taps.expand(len(x), -1))
        smeared = correlate(x, kernels.view(-1, 2 * reach + 1, 2 * reach + 1), "replicate")
    else:
        smeared = _motion_by_taps(x, taps, down, across)
    # 65535 / 255 = 257 steps a level.
    return smeared.mul_(65535).add_(0.5).floor_().div_(257).floor_().div_(255)


def _motion_by_taps(x: Tensor, taps: Tensor, down: Tensor, across: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    pixels, smeared = x.flatten(2), torch.zeros_like(x).flatten(2)
    for i in range(len(taps)):
        rows = (torch.arange(height, device=x.device) + down[:, i, None]).clamp(0, height - 1)
        columns = (torch.arange(width, device=x.device) + across[:, i, None]).clamp(0, width - 1)
        places = (width * rows[:, :, None] + columns[:, None]).flatten(1)
        smeared.addcmul_(pixels.gather(2, places[:, None].expand_as(pixels)), taps[i])
    return smeared.view_as(x)


def correlate(x: Tensor, kernels: Tensor, border: str) -> Tensor:
    """Correlate each image with its kernel, ``[B, k, k]`` or ``[1, k, k]``, through the spectrum.

    Hundreds of taps take ten times as long one by one.
    """
    height, width = x.shape[-2:]
    reach = kernels.shape[-1] // 2
    size = fast_size(height + 2 * reach, width + 2 * reach)
    spectrum = torch.fft.rfft2(kernels, s=size).conj()
    correlated = torch.empty_like(x)
    for channel in range(x.shape[1]):  # one at a time, so that spectra take little memory
        padded = F.pad(x[:, channel, None], [reach] * 4, mode=border)[:, 0]
        product = torch.fft.rfft2(padded, s=size)
        product *= spectrum
        correlated[:, channel] = torch.fft.irfft2(product, s=size)[:, :height, :width]
    return correlated


def fast_size(height: int, width: int) -> tuple[int, int]:
    """Return the next larger sides without a prime factor above 5, which transform quickly."""
    return _smooth(height), _smooth(width)


def _smooth(side: int) -> int:
    rest = side
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return side if rest == 1 else _smooth(side + 1)


def clipped_zoom(x: Tensor, factor: float) -> Tensor:
    """Enlarge the centre of the images to their size, bilinearly, the end samples aligned."""
    height, width = x.shape[-2:]
    inner, outer = zip(*(_zoom_sides(side, factor) for side in (height, width)), strict=True)
    crop = _centre(x, inner)
    return _centre(
        F.interpolate(crop, size=outer, mode="bilinear", align_corners=True), x.shape[-2:]
    )


def _zoom_sides(side: int, factor: float) -> tuple[int, int]:
    inner = math.ceil(side / factor)
    return inner, round(inner * factor)


def _centre(x: Tensor, size: Sequence[int]) -> Tensor:
    (top, left) = ((have - want) // 2 for have, want in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]
