"""Augmented views of images: what is drawn, apart from what is done with it.

First the chain of CoTTA and RoTTA (2203.13591, section 3.2): colours in a random order, a small
affine map, a slight blur, a flip, faint noise; one draw serves a whole batch. Then what destroys
shapes, for DeYO (2403.07366).
"""

import math
from dataclasses import dataclass

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
        sigma: of the blur, in pixels.
        flip: left and right swapped?
        noise: what is added ``[B, C, H, W]``.
    """

    order: list[int]
    factors: Tensor
    affine: Tensor
    sigma: Tensor
    flip: Tensor
    noise: Tensor


def require_images(images: Tensor, method: str) -> None:
    """Refuse what the chain cannot work on, before it clips it.

    Raises:
        ValueError: these are not floating images ``[B, 3, H, W]`` in [0, 1].
    """
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"{method} augments colour images [B, 3, H, W], but the input is {describe(images)}. "
            "Use a method without augmentations for such data."
        )
    low, high = float(images.min()), float(images.max())
    if low < -0.05 or high > 1.05:
        raise ValueError(
            f"{method} augments images in [0, 1], but these span [{low:.2f}, {high:.2f}]. Pass "
            "mean= and std= to adapt(), so that the normalisation can be undone."
        )


def draws(x: Tensor, order: list[int], generator: torch.Generator) -> Draws:
    """Draw the other numbers of one view of images like ``x``, on its device and in float32."""
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
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device=device)
    return Draws(order, factors, affine, sigma, flip < 0.5, 0.005 * noise)


def view(x: Tensor, drawn: Draws) -> Tensor:
    """Return one view of images ``[B, 3, H, W]`` in [0, 1]; same shape, dtype and range."""
    x = x.clamp(0, 1)
    factors = drawn.factors.to(x.dtype)
    operations = (_brightness, _contrast, _saturation, _hue, _gamma)
    for operation in drawn.order:
        x = operations[operation](x, factors[operation])
    height, width = x.shape[-2:]
    padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2), mode="replicate")
    x = _blur(_affine(padded, drawn.affine.to(x.dtype)), drawn.sigma.to(x.dtype))
    x = x[..., height // 2 : height // 2 + height, width // 2 : width // 2 + width]
    x = torch.where(drawn.flip, x.flip(-1), x)
    return (x + drawn.noise.to(x.dtype)).clamp(0, 1)


def many(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``[count, B, 3, H, W]``: so many views, each with a draw for the whole batch."""
    shares = torch.rand(count, 5, generator=generator, device=x.device)
    orders = shares.argsort(1).tolist()  # one look from the host for all views
    return torch.stack([view(x, draws(x, order, generator)) for order in orders])


def crop_draws(
    x: Tensor, count: int, padding: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw first row and first column of a crop, and whether it is flipped, ``[count, B]`` each."""

    def integers(high: int) -> Tensor:
        return torch.randint(high, (count, len(x)), generator=generator, device=x.device)

    return integers(2 * padding + 1), integers(2 * padding + 1), integers(2) == 1


def crops(x: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Return ``[count, B, C, H, W]``: crops of images padded with black, in their own size."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (padding,) * 4)
    rows, columns = (torch.arange(side, device=x.device) for side in (height, width))
    columns = torch.where(flip[..., None], columns.flip(0), columns) + left[..., None]
    rows = rows + top[..., None]
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[image, :, rows[..., None], columns[..., None, :]].movedim(-1, 2)


def contrastive(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return one view of images ``[B, 3, H, W]`` in [0, 1], as SimCLR makes them (2002.05709).

    Each image has draws of its own: a crop of 20% to 100% of the area in any place, resized; a
    flip; with probability 0.8 its colours jittered, with 0.2 gray. Brightness, contrast,
    saturation and hue change in this order, where torchvision draws one.
    """

    def uniform(low: float, high: float) -> Tensor:
        share = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
        return low + (high - low) * share

    area, ratio = uniform(0.2, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = ((area * r).sqrt().clamp(max=1) for r in (ratio, 1 / ratio))
    right, down = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    flip = (uniform(0, 1) < 0.5).to(x.dtype) * 2 - 1
    zero = torch.zeros_like(area)
    theta = torch.stack([width * flip, zero, right, zero, height, down], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, "bilinear", "border", align_corners=False).clamp(0, 1)

    factors = [uniform(0.6, 1.4)[:, None, None, None] for _ in range(3)]
    jittered = _saturation(_contrast(_brightness(x, factors[0]), factors[1]), factors[2])
    jittered = _hue(jittered, uniform(-0.1, 0.1)[:, None, None])
    x = torch.where((uniform(0, 1) < 0.8)[:, None, None, None], jittered, x)
    return torch.where((uniform(0, 1) < 0.2)[:, None, None, None], _gray(x).expand_as(x), x)


def turned(x: Tensor, quarters: Tensor) -> Tensor:
    """Return square images ``[B, C, H, H]``, each turned counter-clockwise by so many quarters."""
    every = torch.stack([x.rot90(k, (-2, -1)) for k in range(4)])
    return every[quarters, torch.arange(len(x), device=x.device)]


def shuffled_patches(x: Tensor, order: Tensor, n: int) -> Tensor:
    """Return images cut into ``n * n`` patches, row by row, patch ``order[b, j]`` at place ``j``.

    Where ``n`` does not divide a side, the image is resized to patches of whole pixels and back.

    Args:
        x: images ``[B, C, H, W]``.
        order: a permutation for each ``[B, n * n]``.
        n: patches along each side.
    """
    size = x.shape[-2:]
    rows, columns = size[0] // n, size[1] // n
    cut = _resized(x, (n * rows, n * columns)).reshape(*x.shape[:2], n, rows, n, columns)
    patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [B, n * n, C, rows, columns]
    patches = patches.take_along_dim(order[:, :, None, None, None], 1)
    placed = patches.reshape(-1, n, n, *patches.shape[2:]).permute(0, 3, 1, 4, 2, 5)
    return _resized(placed.flatten(4, 5).flatten(2, 3), size)


def shuffled_pixels(x: Tensor, order: Tensor) -> Tensor:
    """Return images ``[B, C, H, W]`` with pixel ``order[j]`` ``[H * W]`` at place ``j``."""
    return x.flatten(2)[..., order].view_as(x)


def occluded(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """Return images whose window (first row, first column, rows, columns) has their mean colour."""
    top, left, rows, columns = window
    x, mean = x.clone(), x.mean((2, 3), keepdim=True)
    x[..., top : top + rows, left : left + columns] = mean
    return x


def _resized(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)


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


def _affine(x: Tensor, affine: Tensor) -> Tensor:
    angle, right, down, scale = affine.unbind()
    angle = angle * (math.pi / 180)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    height, width = x.shape[-2:]
    # grid_sample counts in half sizes from the centre.
    v, u = torch.meshgrid(
        torch.arange(height, dtype=x.dtype, device=x.device) - (height - 1) / 2 - down,
        torch.arange(width, dtype=x.dtype, device=x.device) - (width - 1) / 2 - right,
        indexing="ij",
    )
    grid = torch.stack([(cos * u + sin * v) * 2 / width, (cos * v - sin * u) * 2 / height], -1)
    return F.grid_sample(
        x, grid.expand(x.shape[0], -1, -1, -1), mode="bilinear", align_corners=False
    )


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    taps = torch.arange(-2, 3, dtype=x.dtype, device=x.device)
    kernel = (-taps.square() / (2 * sigma.square())).exp()
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    plane = (kernel[:, None] * kernel).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), plane, groups=channels)
