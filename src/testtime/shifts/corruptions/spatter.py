"""Spatter: drops of water or mud, cut from a layer of smoothed noise."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.shifts.corruptions.filters import gaussian_filter
from testtime.shifts.corruptions.noise import Draws, Random, normals

WATER = (175 / 255, 238 / 255, 238 / 255)  # pale turquoise
MUD = (63 / 255, 42 / 255, 20 / 255)

# How many times weak edges grow along one another;
# in 16 images of 224 pixels 8 were enough.
GROWTH = 32


def draw_spatter(x: Tensor, *constants: float, generator: Random) -> Draws:
    """Draw a standard normal for each pixel."""
    batch, _, height, width = x.shape
    return (normals((batch, height, width), x, generator),)


def spatter(
    x: Tensor,
    mean: float,
    deviation: float,
    sigma: float,
    threshold: float,
    amount: float,
    mud: int,
    noise: Tensor,
) -> Tensor:
    """Put drops where smoothed noise passes a threshold.

    Water is brightest inside the rims of the drops; mud covers, with edges blurred by amount.
    """
    liquid = gaussian_filter((mean + deviation * noise)[:, None], sigma)
    liquid = torch.where(liquid < threshold, 0, liquid)
    if mud:
        cover = gaussian_filter((liquid > threshold).to(x), amount)
        cover = torch.where(cover < 0.8, 0, cover)
        return (x * (1 - cover)).add_(cover * _colour(MUD, x)).clamp_(0, 1)
    # The cast to 8 bits of the published code wraps around: a hole in the middle of a deep drop.
    levels = (255 * liquid).floor_().remainder_(256)
    shine = levels * relief(levels)
    peak = shine.amax(dim=(2, 3), keepdim=True)
    shine = shine.div_(torch.where(peak > 0, peak, 1)).mul_(amount)
    return (x + shine * _colour(WATER, x)).clamp_(0, 1)


def _colour(rgb: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(rgb, device=like.device, dtype=like.dtype).view(3, 1, 1)


def relief(levels: Tensor) -> Tensor:
    """Return drops lit from a corner, in levels: the embossed distance from their edges."""
    distance = edge_distance(canny(levels, 50, 150))
    smooth = (_mean3(distance) + 1e-5).floor_()
    even = equalize(smooth)
    # Correlated with the rows (-2 -1 0), (-1 1 1), (0 1 2).
    at = _neighbours(even, "reflect")
    embossed = 2 * (at(1, 1) - at(-1, -1)) + at(0, 1) + at(1, 0) - at(-1, 0) - at(0, -1) + even
    return (_mean3(embossed.clamp_(0, 255)) + 0.5).floor_()


def canny(levels: Tensor, low: int, high: int) -> Tensor:
    """Return edges [B, 1, H, W], bool, as OpenCV's Canny finds them in 8-bit levels."""
    at = _neighbours(levels.int(), "replicate")
    gx = at(-1, 1) + 2 * at(0, 1) + at(1, 1) - at(-1, -1) - 2 * at(0, -1) - at(1, -1)
    gy = at(1, -1) + 2 * at(1, 0) + at(1, 1) - at(-1, -1) - 2 * at(-1, 0) - at(-1, 1)
    size = gx.abs() + gy.abs()
    near = _neighbours(size, "zero")
    # The tangents of 22.5 and 67.5 degrees in fixed point.
    flat, steep = gx.abs() * 13573, gx.abs() * (13573 + 65536)
    rise = gy.abs() << 15
    falling = (gx < 0) == (gy < 0)
    diagonal = torch.where(
        falling, torch.maximum(near(-1, -1), near(1, 1)), torch.maximum(near(-1, 1), near(1, -1))
    )
    peak = torch.where(
        rise < flat,
        (size > near(0, -1)) & (size >= near(0, 1)),
        torch.where(rise > steep, (size > near(-1, 0)) & (size >= near(1, 0)), size > diagonal),
    )
    weak = peak & (size > low)
    edges = weak & (size > high)
    for _ in range(GROWTH):
        columns = edges.clone()
        columns[..., 1:] |= edges[..., :-1]
        columns[..., :-1] |= edges[..., 1:]
        edges = columns.clone()
        edges[..., 1:, :] |= columns[..., :-1, :]
        edges[..., :-1, :] |= columns[..., 1:, :]
        edges &= weak
    return edges


def edge_distance(edges: Tensor, cap: float = 20) -> Tensor:
    """Return the chamfer distance to the nearest edge with steps 1, 1.4 and 2.1969, up to a cap.

    So many steps to the side, diagonal and of a knight make the largest of four linear functions of
    the distances along and across the rows. Hence the nearest edge of each row is enough.
    """
    height = edges.shape[-2]
    across = torch.where(edges, 0.0, cap)
    step = 1
    while step < cap:
        near = across.clone()
        torch.minimum(near[..., step:], across[..., :-step] + step, out=near[..., step:])
        torch.minimum(near[..., :-step], across[..., step:] + step, out=near[..., :-step])
        across, step = near, 2 * step
    distance = across.clone()
    for down in range(1, min(int(cap), height)):
        away = torch.maximum(across + 0.1969 * down, 0.1969 * across + down)
        torch.maximum(away, 0.7969 * across + 0.6031 * down, out=away)
        torch.maximum(away, 0.6031 * across + 0.7969 * down, out=away)
        below, above = distance[..., down:, :], distance[..., :-down, :]
        torch.minimum(below, away[..., :-down, :], out=below)
        torch.minimum(above, away[..., down:, :], out=above)
    return distance


def equalize(levels: Tensor) -> Tensor:
    """Spread levels [B, 1, H, W] so that each takes as many pixels, as OpenCV's equalizeHist."""
    flat = levels.flatten(1).long()
    counts = torch.zeros(len(flat), 256, device=levels.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))
    below = counts.cumsum(1)
    pixels = flat.shape[1]
    first = counts.gather(1, (counts > 0).byte().argmax(1, keepdim=True))
    spread = (255 * (below - first) / (pixels - first).clamp(min=1)).round_()
    spread = torch.where(first == pixels, torch.arange(256.0, device=levels.device), spread)
    return spread.gather(1, flat).view_as(levels)


def _mean3(x: Tensor) -> Tensor:
    """Average over 3 x 3 pixels; the border reflects, the last pixel not repeated."""
    at = _neighbours(x, "reflect")
    rows = [at(down, -1) + at(down, 0) + at(down, 1) for down in (-1, 0, 1)]
    return (rows[0] + rows[1] + rows[2]) / 9


def _neighbours(x: Tensor, border: str) -> Callable[[int, int], Tensor]:
    """Return a function that gives, for every pixel, the one so far down and across, up to 1."""
    height, width = x.shape[-2:]
    if border == "zero":
        padded = F.pad(x, [1] * 4)
    else:
        padded = F.pad(x.float(), [1] * 4, mode=border).to(x.dtype)
    return lambda down, across: padded[..., 1 + down :, 1 + across :][..., :height, :width]
