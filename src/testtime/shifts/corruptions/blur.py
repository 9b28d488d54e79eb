"""Blurs: defocus, glass, motion, zoom and Gaussian."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.shifts.corruptions.filters import (
    clipped_zoom,
    correlate,
    cut,
    gaussian_filter,
    motion_filter,
)
from testtime.shifts.corruptions.noise import Draws, Random, integers, uniforms


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Spread each pixel by a Gaussian of that standard deviation in pixels."""
    return gaussian_filter(x, sigma).clamp_(0, 1)


def defocus_blur(x: Tensor, radius: float, alias_sigma: float) -> Tensor:
    """Spread each pixel over a disk of that radius in pixels, its edge smoothed by a Gaussian."""
    height, width = x.shape[-2:]
    taps = _disk_taps(radius, alias_sigma)
    reach = max(abs(down) for down, _, _ in taps)
    if reach > 2:
        kernel = disk(radius, alias_sigma)
        middle = slice(len(kernel) // 2 - reach, len(kernel) // 2 + reach + 1)
        return correlate(x, kernel[None, middle, middle].to(x), "reflect").clamp_(0, 1)
    padded = F.pad(x, [reach] * 4, mode="reflect")
    blurred = torch.zeros_like(x)
    for down, across, weight in taps:
        top, left = reach + down, reach + across
        blurred.add_(padded[..., top : top + height, left : left + width], alpha=weight)
    return blurred.clamp_(0, 1)


@functools.lru_cache(maxsize=32)
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
    gauss = (gauss / gauss.sum())[:, None]
    padded = F.pad((inside / inside.sum())[None, None], [support] * 4, mode="reflect")
    return F.conv2d(padded, (gauss * gauss.T)[None, None])[0, 0]


@functools.lru_cache(maxsize=32)
def _disk_taps(radius: float, alias_sigma: float) -> tuple[tuple[int, int, float], ...]:
    kernel = disk(radius, alias_sigma).tolist()
    reach = len(kernel) // 2
    return tuple(
        (down - reach, across - reach, weight)
        for down, row in enumerate(kernel)
        for across, weight in enumerate(row)
        if weight > 1e-9
    )


def draw_glass_blur(
    x: Tensor, sigma: float, reach: int, iterations: int, generator: Random
) -> Draws:
    """Draw a neighbour for each pixel that is visited, in each iteration.

    One integer for both offsets, ``[B, iterations, H - 2 reach, W - 2 reach]``, rows and columns
    ascending: ``2 reach (dy + reach) + dx + reach`` with dx and dy from -reach to reach - 1.
    """
    height, width = x.shape[-2:]
    size = (len(x), iterations, height - 2 * reach, width - 2 * reach)
    return (integers((2 * reach) ** 2, size, x, generator),)


def glass_blur(x: Tensor, sigma: float, reach: int, iterations: int, neighbours: Tensor) -> Tensor:
    """Blur, let pixels take the value of a neighbour up to reach away, and blur again."""
    levels = cut(gaussian_filter(x, sigma))
    sources = None
    for codes in neighbours.unbind(1):
        step = _copied_from(codes, reach, *x.shape[-2:])
        sources = step if sources is None else _look_up(sources, step)
    assert sources is not None
    shuffled = _look_up(levels.flatten(2), sources[:, None].expand(-1, 3, -1)).view_as(x)
    del levels, sources
    return gaussian_filter(shuffled.div_(255), sigma).clamp_(0, 1)


def _copied_from(codes: Tensor, reach: int, height: int, width: int) -> Tensor:
    """Return which pixel's value each pixel has after one iteration, [B, H * W].

    Pixels are visited from the lower right on, row by row, and take the present value of their
    neighbour: its new one, where it lies behind (below, or to the right) and so was visited before.
    Instead of walking, each pixel points to its neighbour's new or old value, and all pointers to
    new values are replaced by what these point to, again and again: each time doubles the way.
    """
    pixels = height * width
    index = torch.arange(pixels, device=codes.device, dtype=torch.int32)
    # The first half of the pointers stands for new values, the second for old ones.
    pointers = (index + pixels).repeat(len(codes), 2)
    new = pointers[:, :pixels]
    inside = slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1)
    offsets = torch.arange(-reach, reach, device=codes.device, dtype=torch.int32)
    offsets = (width * offsets[:, None] + offsets).flatten()
    jumps = offsets + pixels * (offsets <= 0)
    targets = jumps.index_select(0, codes.flatten()).view(codes.shape)
    targets += index.view(height, width)[inside]
    new.view(len(codes), height, width)[:, *inside] = targets
    # With reach 1 nothing lies behind. Else a way goes on with a chance of 0.42 at most, so more
    # than 64 steps do not happen (1e-24).
    for _ in range(0 if reach == 1 else 6):
        new.copy_(_look_up(pointers, new))
    return new - pixels


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Return ``table.gather(-1, index)``; a selection from one long row is three times as fast."""
    rows = torch.arange(table[..., 0].numel(), device=index.device) * table.shape[-1]
    flat = index + rows.view(*table.shape[:-1], 1).to(_index_dtype(table))
    return table.flatten().index_select(0, flat.flatten()).view(index.shape)


def _index_dtype(table: Tensor) -> torch.dtype:
    return torch.int32 if table.numel() < 2**31 else torch.int64


def draw_motion_blur(x: Tensor, radius: float, sigma: float, generator: Random) -> Draws:
    """Draw the angle of each image, in degrees: within 45 of the right."""
    return (90 * uniforms((len(x),), x, generator) - 45,)


def motion_blur(x: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """Smear each image along a line; the result is on 8-bit levels."""
    return motion_filter(x, radius, sigma, degrees).clamp_(0, 1)


def zoom_blur(x: Tensor, count: int, step: float) -> Tensor:
    """Average the image and its enlargements by 1, 1 + step, 1 + 2 step and so on."""
    # As the factors of the published code came out; their last digit sets the size of one.
    step = (1 + step) - 1
    total = 2 * x  # the factor 1 is among the enlargements
    for i in range(1, count):
        total += clipped_zoom(x, 1 + i * step)
    return (total / (count + 1)).clamp_(0, 1)
