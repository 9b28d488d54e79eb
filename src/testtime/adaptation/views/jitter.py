"""Colours in a random order and small moves, the views of CoTTA, RoTTA and ROID.

The chain of CoTTA and RoTTA (2203.13591, section 3.2): colours in a random order, a small affine
map, a slight blur, a flip, faint noise. That of ROID has neither blur nor noise, and its images go
on beyond their borders as in a mirror. One draw serves a whole batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.adaptation.calls import describe

# brightness, contrast, saturation, hue, gamma
_LOW = (0.6, 0.7, 0.5, -0.06, 0.7)
_HIGH = (1.4, 1.3, 1.5, 0.06, 1.3)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one view.

    Args:
        order: in which the colour operations run: 0 to 4 are brightness, contrast, saturation, hue
            and gamma. On the host, for it says what runs.
        factors: theirs, in that numbering ``[5]``.
        affine: degrees, pixels to the right and down, scale ``[4]``.
        flip: left and right swapped?
        sigma: of the blur, in pixels; none: there is no blur.
        noise: what is added ``[B, C, H, W]``; none: nothing is.
    """

    order: list[int]
    factors: Tensor
    affine: Tensor
    flip: Tensor
    sigma: Tensor | None = None
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


def draws(x: Tensor, order: list[int], generator: torch.Generator, *, blur: bool = True) -> Draws:
    """Draw the other numbers of one view of images like ``x``, on its device and in float32.

    Args:
        x: images ``[B, 3, H, W]``.
        order: of the colour operations.
        generator: on the device of ``x``.
        blur: and noise, or neither.
    """
    device = x.device

    def uniform(low: list[float], high: list[float]) -> Tensor:
        bounds = torch.tensor([low, high], dtype=torch.float32, device=device)
        share = torch.rand(len(low), generator=generator, dtype=torch.float32, device=device)
        return bounds[0] + (bounds[1] - bounds[0]) * share

    factors = uniform(list(_LOW), list(_HIGH))
    # Up to 1/16 of the padded size, which is twice the image's.
    across, down = (2 * size / 16 for size in (x.shape[-1], x.shape[-2]))
    affine = uniform([-15.0, -across, -down, 0.9], [15.0, across, down, 1.1])
    affine[1:3] = affine[1:3].round()
    sigma, flip = uniform([0.001, 0.0], [0.5, 1.0])
    if not blur:
        return Draws(order, factors, affine, flip < 0.5)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device=device)
    return Draws(order, factors, affine, flip < 0.5, sigma, 0.005 * noise)


def view(x: Tensor, drawn: Draws, padding: Literal["replicate", "reflect"] = "replicate") -> Tensor:
    """Return one view of images ``[B, 3, H, W]`` in [0, 1]; same shape, dtype and range.

    Args:
        x: the images.
        drawn: the random numbers of the view.
        padding: how the images go on beyond their borders, by half their size; then it is black.
    """
    x = x.clamp(0, 1)
    factors = drawn.factors.to(x.dtype)
    operations = (_brightness, _contrast, _saturation, _hue, _gamma)
    for operation in drawn.order:
        x = operations[operation](x, factors[operation])
    height, width = x.shape[-2:]
    padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2), mode=padding)
    # Of the padded view the middle alone is kept; the blur reaches two pixels beyond it.
    margin = 0 if drawn.sigma is None else 2
    x = _affine(padded, drawn.affine.to(x.dtype), (height + 2 * margin, width + 2 * margin))
    if drawn.sigma is not None:
        x = _blur(x, drawn.sigma.to(x.dtype))
    x = torch.where(drawn.flip, x.flip(-1), x)
    if drawn.noise is not None:
        x = x + drawn.noise.to(x.dtype)
    return x.clamp(0, 1)


def many(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``[count, B, 3, H, W]``: so many views, each with a draw for the whole batch."""
    shares = torch.rand(count, 5, generator=generator, device=x.device)
    orders = shares.argsort(1).tolist()  # one look from the host for all views
    return torch.stack([view(x, draws(x, order, generator)) for order in orders])


def _gray(x: Tensor) -> Tensor:
    red, green, blue = x.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def _blend(x: Tensor, other: Tensor, f: Tensor) -> Tensor:
    return (f * x + (1 - f) * other).clamp(0, 1)


def _brightness(x: Tensor, f: Tensor) -> Tensor:
    return (f * x).clamp(0, 1)


def _contrast(x: Tensor, f: Tensor) -> Tensor:
    return _blend(x, _gray(x).mean((-3, -2, -1), keepdim=True), f)


def _saturation(x: Tensor, f: Tensor) -> Tensor:
    return _blend(x, _gray(x), f)


def _gamma(x: Tensor, f: Tensor) -> Tensor:
    return (x.clamp(1e-8, 1) ** f).clamp(0, 1)


def _hue(x: Tensor, f: Tensor) -> Tensor:
    """Turn the hue by ``f`` turns, in float32 whatever the images are, as torchvision does."""
    red, green, blue = x.float().unbind(1)
    high, low = x.float().amax(1), x.float().amin(1)
    gray = high == low
    span = high - low
    saturation = span / torch.where(gray, 1, high)
    divisor = torch.where(gray, 1, span)
    r, g, b = ((high - c) / divisor for c in (red, green, blue))
    hue = torch.where(high == red, b - g, torch.where(high == green, 2 + r - b, 4 + g - r))
    hue = ((hue / 6 + 1).fmod(1) + f.float()).remainder(1)
    sector = (6 * hue).floor()
    rest = 6 * hue - sector
    v = high
    p = (v * (1 - saturation)).clamp(0, 1)
    q = (v * (1 - saturation * rest)).clamp(0, 1)
    w = (v * (1 - saturation * (1 - rest))).clamp(0, 1)
    sector = sector.long() % 6
    rows = ((v, q, p, p, w, v), (w, v, v, q, p, p), (p, p, w, v, v, q))
    turned = [torch.stack(row).gather(0, sector.unsqueeze(0)).squeeze(0) for row in rows]
    return torch.stack(turned, 1).to(x.dtype)


def _affine(x: Tensor, affine: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the middle of the images, turned, moved and scaled, of this height and width."""
    angle, right, down, scale = affine.unbind()
    angle = angle * (math.pi / 180)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    height, width = x.shape[-2:]
    v, u = torch.meshgrid(
        torch.arange(size[0], dtype=x.dtype, device=x.device) - (size[0] - 1) / 2 - down,
        torch.arange(size[1], dtype=x.dtype, device=x.device) - (size[1] - 1) / 2 - right,
        indexing="ij",
    )
    # grid_sample counts in half sizes.
    grid = torch.stack([(cos * u + sin * v) * 2 / width, (cos * v - sin * u) * 2 / height], -1)
    return F.grid_sample(
        x, grid.expand(x.shape[0], -1, -1, -1), mode="bilinear", align_corners=False
    )


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the images blurred by a kernel of 5 x 5, without their outermost two pixels."""
    taps = torch.arange(-2, 3, dtype=x.dtype, device=x.device)
    kernel = (-taps.square() / (2 * sigma.square())).exp()
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    return F.conv2d(x, (kernel[:, None] * kernel).expand(channels, 1, 5, 5), groups=channels)
