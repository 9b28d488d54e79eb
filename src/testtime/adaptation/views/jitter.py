"""Colours in a random order and small moves, the views of CoTTA, RoTTA and ROID.

The chain of CoTTA and RoTTA (2203.13591, section 3.2): colours in a random order, a small affine
map, a slight blur, a flip, faint noise. That of ROID has neither blur nor noise, and its images go
on beyond their borders as in a mirror. One draw serves a whole batch; views are made together.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.adaptation.calls import describe
from testtime.adaptation.views import colours

# brightness, contrast, saturation, hue, gamma
_LOW = (0.6, 0.7, 0.5, -0.06, 0.7)
_HIGH = (1.4, 1.3, 1.5, 0.06, 1.3)


@dataclass(frozen=True)
class Draws:
    """The random numbers of ``V`` views.

    Args:
        orders: in which the colour operations run, for each view: 0 to 4 are brightness, contrast,
            saturation, hue and gamma. On the host, for it says what runs.
        factors: theirs, in that numbering ``[V, 5]``.
        affine: degrees, pixels to the right and down, scale ``[V, 4]``.
        flips: left and right swapped? ``[V]``.
        sigmas: of the blur, in pixels ``[V]``; none: there is no blur.
        noise: what is added ``[V, B, C, H, W]``; none: nothing is.
    """

    orders: list[list[int]]
    factors: Tensor
    affine: Tensor
    flips: Tensor
    sigmas: Tensor | None = None
    noise: Tensor | None = None


def require_images(images: Tensor, method: str) -> None:
    """Refuse what the chain cannot work on, before it clips it.

    Raises:
        ValueError: these are not floating images ``[B, 3, H, W]`` in [0, 1].
    """
    small = images.dim() == 4 and min(images.shape[-2:]) < 4
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point() or small:
        raise ValueError(
            f"{method} augments colour images [B, 3, H, W] of at least 4 x 4 pixels, but the input "
            f"is {describe(images)}. Use a method without augmentations for such data."
        )
    low, high = float(images.min()), float(images.max())
    if low < -0.05 or high > 1.05:
        raise ValueError(
            f"{method} augments images in [0, 1], but these span [{low:.2f}, {high:.2f}]. Pass "
            "mean= and std= to adapt(), so that the normalisation can be undone."
        )


def require_rows(logits: Tensor, method: str) -> None:
    """Refuse dense logits: those of a view that is moved are not of the pixels of the image.

    Raises:
        ValueError: the logits are not ``[B, C]``.
    """
    if logits.dim() != 2:
        raise ValueError(
            f"{method} compares views that are moved and flipped, but the logits are dense, "
            f"{list(logits.shape)}: their pixels do not lie one over the other. Use a method "
            "without augmentations for such a model."
        )


def draw_orders(x: Tensor, count: int, generator: torch.Generator) -> list[list[int]]:
    """Draw in which order the colours of so many views change; one look from the host."""
    shares = torch.rand((count, 5), generator=generator, device=x.device)
    orders: list[list[int]] = shares.argsort(1).tolist()
    return orders


def draws(
    x: Tensor, orders: list[list[int]], generator: torch.Generator, *, blur: bool = True
) -> Draws:
    """Draw the other numbers of views of images like ``x``, on its device and in float32.

    Args:
        x: images ``[B, 3, H, W]``.
        orders: of the colour operations, for each view.
        generator: on the device of ``x``.
        blur: and noise, or neither.
    """
    device, count = x.device, len(orders)

    def uniform(low: list[float], high: list[float]) -> Tensor:
        bounds = torch.tensor([low, high], dtype=torch.float32, device=device)
        shape = (count, len(low))
        share = torch.rand(shape, generator=generator, dtype=torch.float32, device=device)
        return bounds[0] + (bounds[1] - bounds[0]) * share

    factors = uniform(list(_LOW), list(_HIGH))
    # Up to 1/16 of the padded size, which is twice the image's.
    across, down = (2 * size / 16 for size in (x.shape[-1], x.shape[-2]))
    affine = uniform([-15.0, -across, -down, 0.9], [15.0, across, down, 1.1])
    affine[:, 1:3] = affine[:, 1:3].round()
    sigmas, flips = uniform([0.001, 0.0], [0.5, 1.0]).unbind(1)
    if not blur:
        return Draws(orders, factors, affine, flips < 0.5)
    shape = (count, *x.shape)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
    return Draws(orders, factors, affine, flips < 0.5, sigmas, 0.005 * noise)


def views(
    x: Tensor, drawn: Draws, padding: Literal["replicate", "reflect"] = "replicate"
) -> Tensor:
    """Return views ``[V, B, 3, H, W]`` of images ``[B, 3, H, W]`` in [0, 1]; their dtype and range.

    Args:
        x: the images.
        drawn: the random numbers of the views.
        padding: how the images go on beyond their borders, by half their size; then it is black.
    """
    if x.dtype.itemsize < 4:  # places of pixels need more digits than their values
        return views(x.float(), drawn, padding).to(x.dtype)
    height, width = x.shape[-2:]
    x = _colours(x.clamp(0, 1), drawn)
    border = (width // 2, width // 2, height // 2, height // 2)
    padded = F.pad(x.flatten(1, 2), border, mode=padding)
    # Of the padded view the middle alone is kept; the blur reaches two pixels beyond it.
    margin = 0 if drawn.sigmas is None else 2
    moved = _affine(padded, drawn.affine.to(x.dtype), (height + 2 * margin, width + 2 * margin))
    if drawn.sigmas is not None:
        moved = _blur(moved, drawn.sigmas.to(x.dtype))
    x = moved.view(x.shape)
    x = torch.where(_wide(drawn.flips, x), x.flip(-1), x)
    if drawn.noise is not None:
        x = x + drawn.noise.to(x.dtype)
    return x.clamp(0, 1)


def many(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``[count, B, 3, H, W]``: so many views, each with a draw for the whole batch."""
    orders, piece = draw_orders(x, count, generator), at_once(x)
    parts = [orders[first : first + piece] for first in range(0, count, piece)]
    return torch.cat([views(x, draws(x, part, generator)) for part in parts])


def at_once(x: Tensor) -> int:
    """Return how many views of a batch are handled together: of 4 million values, or one."""
    return max(1, 2**22 // x.numel())


def _wide(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 1))


def _colours(x: Tensor, drawn: Draws) -> Tensor:
    """Return ``[V, B, 3, H, W]``: images after their colour operations, view by view in order."""
    factors = drawn.factors.to(x.dtype)
    x = x.repeat(len(drawn.orders), 1, 1, 1, 1)
    operations = (
        colours.brightness,
        colours.contrast,
        colours.saturation,
        colours.hue,
        colours.gamma,
    )
    for place in range(len(operations)):
        for number, operation in enumerate(operations):
            those = [k for k, order in enumerate(drawn.orders) if order[place] == number]
            if those:
                x[those] = operation(x[those], _wide(factors[those, number], x))
    return x


def _affine(x: Tensor, affine: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the middle of images ``[V, B * C, H, W]``, turned, moved and scaled, of this size."""
    angle, right, down, scale = (t.view(-1, 1, 1) for t in affine.unbind(1))
    angle = angle * (math.pi / 180)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    height, width = x.shape[-2:]
    v, u = (
        torch.arange(length, dtype=x.dtype, device=x.device) - (length - 1) / 2 for length in size
    )
    v, u = v.view(-1, 1) - down, u - right
    # grid_sample counts in half sizes.
    grid = torch.stack([(cos * u + sin * v) * 2 / width, (cos * v - sin * u) * 2 / height], -1)
    return F.grid_sample(x, grid, mode="bilinear", align_corners=False)


def _blur(x: Tensor, sigmas: Tensor) -> Tensor:
    """Return images ``[V, B * C, H, W]`` blurred by 5 x 5, without their outermost two pixels."""
    taps = torch.arange(-2, 3, dtype=x.dtype, device=x.device)
    kernels = (-taps.square() / (2 * sigmas.square().unsqueeze(1))).exp()
    kernels = kernels / kernels.sum(1, keepdim=True)
    height, width = x.shape[-2] - 4, x.shape[-1] - 4
    weights = [_wide(kernels[:, k], x) for k in range(5)]
    x = _sum([weights[k] * x[..., k : k + height, :] for k in range(5)])
    return _sum([weights[k] * x[..., k : k + width] for k in range(5)])


def _sum(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)
