"""What cameras and files do: brightness, contrast, saturation, elastic, pixelate."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.shifts.corruptions.filters import gaussian_filter
from testtime.shifts.corruptions.noise import Draws, Random, uniforms


def brightness(x: Tensor, added: float) -> Tensor:
    """Add to the value of hue, saturation and value; the other two stay."""
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + added).clamp(max=1)
    return torch.where(value > 0, x * (brighter / value), brighter).clamp_(0, 1)


def saturate(x: Tensor, factor: float, added: float) -> Tensor:
    """Multiply the saturation of hue, saturation and value by a factor, and add to it.

    Grey has the hue of red, so that adding saturation turns it reddish; the published code does so.
    """
    value = x.amax(dim=1, keepdim=True)
    spread = value - x.amin(dim=1, keepdim=True)
    saturation = torch.where(spread > 0, spread / value, 0)
    changed = (factor * saturation + added).clamp(0, 1)
    red = torch.cat([value, *[value * (1 - changed)] * 2], dim=1)
    coloured = value - (value - x) * (changed / saturation)
    return torch.where(spread > 0, coloured, red).clamp_(0, 1)


def contrast(x: Tensor, factor: float) -> Tensor:
    """Pull every value towards the mean of its channel; the distance shrinks by that factor."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    return torch.add((1 - factor) * mean, x, alpha=factor).clamp_(0, 1)


def draw_elastic_transform(
    x: Tensor, alpha: float, sigma: float, reach: float, generator: Random
) -> Draws:
    """Draw uniforms in (-1, 1): where three points go [B, 3, 2], and two fields [B, 2, H, W].

    The points are (x, y), and the fields displace along x, then y.
    """
    points = uniforms((len(x), 3, 2), x, generator)
    fields = uniforms((len(x), 2, *x.shape[2:]), x, generator)
    return 2 * points - 1, fields.mul_(2).sub_(1)


def elastic_transform(
    x: Tensor, alpha: float, sigma: float, reach: float, points: Tensor, fields: Tensor
) -> Tensor:
    """Move three points by up to reach pixels, the image with them; then every pixel a little.

    The second displacement is noise in (-alpha, alpha), smoothed by a Gaussian of sigma.
    """
    sheared = _affine(x, reach * points)
    if alpha == 0:
        return sheared.clamp_(0, 1)
    height, width = x.shape[-2:]
    across, down = (alpha * gaussian_filter(fields, sigma, truncate=3, border="reflect")).unbind(1)
    across += torch.arange(width, device=x.device)
    down += torch.arange(height, device=x.device)[:, None]
    # Positions of a grid without aligned corners count from the edge of the first pixel.
    grid = torch.stack([(2 * across + 1) / width - 1, (2 * down + 1) / height - 1], dim=3)
    moved = F.grid_sample(sheared, grid, padding_mode="reflection", align_corners=False)
    return moved.clamp_(0, 1)


def _affine(x: Tensor, shifts: Tensor) -> Tensor:
    """Resample so that three points around the centre move by shifts [B, 3, 2], in pixels."""
    height, width = x.shape[-2:]
    side = min(height, width) // 3
    corners = torch.tensor([[side, side], [side, -side], [-side, -side]], device=x.device)
    centre = torch.tensor([width // 2, height // 2], device=x.device)
    before = (centre + corners).to(shifts)
    after = before + shifts
    # Backwards, from where a pixel is to where it came from: two edges of the triangle give the
    # linear part.
    first, second = after[:, 0] - after[:, 1], after[:, 1] - after[:, 2]
    area = (first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0])[:, None]
    from_x = torch.stack([-first[:, 1], first[:, 0]], dim=1) * (2 * side) / area
    from_y = torch.stack([second[:, 1], -second[:, 0]], dim=1) * (2 * side) / area
    across = torch.arange(width, device=x.device) - after[:, 0, 0, None]
    down = torch.arange(height, device=x.device) - after[:, 0, 1, None]
    sizes = (width, height)
    grid = []
    for axis, row in enumerate((from_x, from_y)):
        place = row[:, 0, None, None] * across[:, None] + row[:, 1, None, None] * down[:, :, None]
        place += before[0, axis]
        # OpenCV 3 and 4 look up to a 32nd of a pixel.
        place = (32 * place + 0.5).floor_() / 32
        grid.append(2 * place / (sizes[axis] - 1) - 1)
    return F.grid_sample(x, torch.stack(grid, dim=3), padding_mode="reflection", align_corners=True)


def pixelate(x: Tensor, factor: float) -> Tensor:
    """Shrink by a factor and enlarge again, on 8-bit levels, as Pillow does with its box filter.

    A pixel of the small image is the plain mean of those whose centres lie in it.
    """
    height, width = x.shape[-2:]
    # Along the rows first, and rounded in between.
    small = _shrink_rows((255 * x).round_(), int(width * factor))
    small = _shrink_rows(small.transpose(2, 3), int(height * factor)).transpose(2, 3)
    columns = _nearest(small.shape[3], width).to(x.device)
    rows = _nearest(small.shape[2], height).to(x.device)
    wide = small.div_(255).gather(3, columns.expand(*small.shape[:3], -1))
    return wide.index_select(2, rows)


def _shrink_rows(levels: Tensor, side: int) -> Tensor:
    """Return rows of that many pixels, whole levels: each the mean of the pixels of its box."""
    first, counts = (t.to(levels.device) for t in _boxes(levels.shape[3], side))
    shape = (*levels.shape[:3], -1)
    total = levels.gather(3, first.expand(shape))
    # Boxes hold so many pixels, give or take one.
    for i in range(1, math.ceil(levels.shape[3] / side)):
        more = levels.gather(3, (first + (counts - 1).clamp(max=i)).expand(shape))
        total.addcmul_(more, (i < counts).to(levels))
    # A whole mean may come out a little below: thirds.
    return total.div_(counts).add_(0.5 + 1e-3).floor_()


@functools.lru_cache(maxsize=32)
def _boxes(side: int, small: int) -> tuple[Tensor, Tensor]:
    """Return the first pixel of each box, and how many it holds."""
    scale = side / small
    centre = (torch.arange(small, dtype=torch.float64)[:, None] + 0.5) * scale
    pixel = torch.arange(side)
    first, end = (centre - scale / 2 + 0.5).floor(), (centre + scale / 2 + 0.5).floor()
    place = (pixel - centre + 0.5) / scale
    inside = (pixel >= first) & (pixel < end) & (place > -0.5) & (place <= 0.5)
    return inside.byte().argmax(1), inside.sum(1)


@functools.lru_cache(maxsize=32)
def _nearest(small: int, side: int) -> Tensor:
    """Return the small pixel that holds the centre of each large one."""
    return ((torch.arange(side, dtype=torch.float64) + 0.5) * small / side).long()
