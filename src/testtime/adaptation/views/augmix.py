"""AugMix as MEMO has it: mixtures of an image with three short chains of simple operations.

Papers: Hendrycks et al., ICLR 2020, arXiv 1912.02781; Zhang et al., arXiv 2110.09506 (MEMO). By
default everything is batched torch on the device of the images, continuous between its 256 levels.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# In the order of the numbers that stand for them.
OPERATIONS = (
    *("autocontrast", "equalize", "rotate", "solarize", "shear_x", "shear_y"),
    *("translate_x", "translate_y", "posterize"),
)
WIDTH = _DEPTH = 3  # chains, and the most operations in each
_PADDING = 4  # pixels

Crop = Literal["padded", "resized"]


@dataclass(frozen=True)
class Mixtures:
    """The random numbers of ``V`` views.

    Args:
        boxes: what is cropped: top, left, height and width in pixels ``[V, 4]``; may lie beyond.
        flips: left and right swapped? ``[V]``.
        operations: of the three chains of up to three, indices in ``OPERATIONS``; -1: none
            ``[V, 3, 3]``.
        levels: how strong each is, from 0.1 to 1 ``[V, 3, 3]``.
        negative: its direction, for those that have one ``[V, 3, 3]``.
        weights: of the chains, sum 1 ``[V, 3]``.
        shares: of the plain view ``[V]``.
    """

    boxes: Tensor
    flips: Tensor
    operations: Tensor
    levels: Tensor
    negative: Tensor
    weights: Tensor
    shares: Tensor


def draw_mixtures(x: Tensor, count: int, crop: Crop, generator: torch.Generator) -> Mixtures:
    """Draw the numbers of views of images like ``x``, on its device and in float32.

    Args:
        x: images ``[B, 3, H, W]``, which share the numbers.
        count: how many views.
        crop: of the image in 4 pixels of black (CIFAR), or of 8 to 100 % of it, resized (ImageNet).
        generator: on the device of ``x``.
    """
    height, width = x.shape[-2:]
    device = x.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32, device=device)

    size = torch.tensor([height, width], device=device)
    if crop == "padded":
        sides = size.float().expand(count, 2)
        corners = (uniform(count, 2) * (2 * _PADDING + 1)).floor() - _PADDING
    else:
        area, ratio = uniform(count, 2).unbind(1)
        ratio = ((2 * ratio - 1) * math.log(4 / 3)).exp()
        root = ((0.08 + 0.92 * area) * height * width).sqrt()
        sides = torch.stack([root / ratio.sqrt(), root * ratio.sqrt()], 1).round().minimum(size)
        corners = (uniform(count, 2) * (size - sides + 1)).floor()
    lengths = 1 + (uniform(count, WIDTH, 1) * _DEPTH).floor()
    choices = (uniform(count, WIDTH, _DEPTH) * len(OPERATIONS)).long()
    there = torch.arange(_DEPTH, device=device) < lengths
    weights = -(1 - uniform(count, WIDTH)).log()  # exponential, so that shares are Dirichlet(1)
    return Mixtures(
        boxes=torch.cat([corners, sides], 1),
        flips=uniform(count) < 0.5,
        operations=torch.where(there, choices, -1),
        levels=0.1 + 0.9 * uniform(count, WIDTH, _DEPTH),
        negative=uniform(count, WIDTH, _DEPTH) > 0.5,
        weights=weights / weights.sum(1, keepdim=True),
        shares=uniform(count),
    )


def chains(
    x: Tensor, drawn: Mixtures, fill: tuple[float, float, float] = (128 / 255,) * 3
) -> tuple[Tensor, Tensor]:
    """Return plain views ``[V, B, 3, H, W]`` and the ends of the chains ``[V, 3, B, 3, H, W]``.

    Args:
        x: images ``[B, 3, H, W]`` in [0, 1].
        drawn: the random numbers of the views.
        fill: the colour of what lies beyond an image that is turned, sheared or moved.
    """
    if x.dtype.itemsize < 4:  # places of pixels need more digits than their values
        plain, ends = chains(x.float(), drawn, fill)
        return plain.to(x.dtype), ends.to(x.dtype)
    plain = _cropped(x, drawn)
    now = plain.unsqueeze(1).expand(-1, WIDTH, *plain.shape[1:])
    for depth in range(_DEPTH):
        now = _operate(now, *_of(drawn, depth), x.new_tensor(fill))
    return plain, now


def mixed(plain: Tensor, ends: Tensor, drawn: Mixtures) -> Tensor:
    """Return the mixtures ``[V, B, 3, H, W]`` of plain views and chains, as ``chains`` gives them.

    They may be normalised before: a mixture of inputs is the input of the mixture.
    """
    share, rest, weights = (
        t.to(plain.dtype).reshape(*t.shape, *[1] * (plain.dim() - 1))
        for t in (drawn.shares, 1 - drawn.shares, drawn.weights)
    )
    return share * plain + rest * (weights * ends).sum(1)


def _of(drawn: Mixtures, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    every = (drawn.operations, drawn.levels, drawn.negative)
    one, two, three = (t[..., depth] for t in every)
    return one, two, three


def _cropped(x: Tensor, drawn: Mixtures) -> Tensor:
    """Return the boxes in the images' own size, flipped or not; black beyond the images."""
    rows, columns = x.shape[-2:]
    top, left, height, width = drawn.boxes.to(x.dtype).unbind(1)
    flip, zero = torch.where(drawn.flips, -1, 1).to(x.dtype), torch.zeros_like(top)
    start = torch.where(drawn.flips, left + width, left)
    across = torch.stack([flip * width / columns, zero, start], 1)
    down = torch.stack([zero, height / rows, top], 1)
    views = x.unsqueeze(0).expand(len(top), *x.shape)
    warped, inside = _warp(views, torch.stack([across, down], 1))
    return warped * inside


def _operate(x: Tensor, operation: Tensor, level: Tensor, negative: Tensor, fill: Tensor) -> Tensor:
    """Return images ``[V, 3, B, C, H, W]``, each after its operation ``[V, 3]``."""
    level = level.to(x.dtype)
    sign = torch.where(negative, -1, 1).to(x.dtype)
    warped, inside = _warp(x.flatten(0, 1), _matrices(x, operation, level, sign).flatten(0, 1))
    moved = torch.where(inside, warped, fill.view(-1, 1, 1)).view(x.shape)

    def chosen(name: str) -> Tensor:
        return (operation == OPERATIONS.index(name))[..., None, None, None, None]

    threshold = (256 - (25.6 * level).floor())[..., None, None, None, None]
    values = (255 * x).round()
    other = {
        "autocontrast": _autocontrast(x),
        "equalize": _equalize(values),
        "solarize": torch.where(values >= threshold, 1 - x, x),
        "posterize": (values / 16).floor() * 16 / 255,
    }
    result = torch.where((operation < 0)[..., None, None, None, None], x, moved)
    for name, image in other.items():
        result = torch.where(chosen(name), image, result)
    return result


def _matrices(x: Tensor, operation: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Return ``[..., 2, 3]``: from pixels of the result to those of the image."""
    rows, columns = x.shape[-2:]

    def where(name: str, value: Tensor) -> Tensor:
        return torch.where(operation == OPERATIONS.index(name), sign * value, 0)

    # Pillow turns counter-clockwise, where rows go down.
    angle = where("rotate", (3 * level).floor()) * (math.pi / 180)
    shear = [where(f"shear_{axis}", 0.03 * level) for axis in "xy"]
    moves = [
        where(f"translate_{axis}", (level * side / 30).floor())
        for axis, side in (("x", columns), ("y", rows))
    ]
    cos, sin = angle.cos(), angle.sin()
    # Turned around the middle, sheared and moved from the corner.
    across = columns / 2 - cos * columns / 2 + sin * rows / 2
    down = rows / 2 - sin * columns / 2 - cos * rows / 2
    first = torch.stack([cos, shear[0] - sin, across + moves[0]], -1)
    second = torch.stack([sin + shear[1], cos, down + moves[1]], -1)
    return torch.stack([first, second], -2)


def _warp(x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return images ``[K, B, C, H, W]`` read where ``[K, 2, 3]`` says, and where that is inside."""
    rows, columns = x.shape[-2:]
    v, u = torch.meshgrid(
        torch.arange(rows, dtype=x.dtype, device=x.device) + 0.5,
        torch.arange(columns, dtype=x.dtype, device=x.device) + 0.5,
        indexing="ij",
    )
    places = torch.stack([u, v, torch.ones_like(u)], -1) @ matrix.mT.unsqueeze(1)
    size = x.new_tensor([columns, rows])
    inside = ((places >= 0) & (places < size)).all(-1)
    flat = x.flatten(1, 2)
    warped = F.grid_sample(
        flat, 2 * places / size - 1, mode="bilinear", padding_mode="border", align_corners=False
    )
    return warped.view(x.shape), inside[:, None, None]


def _autocontrast(x: Tensor) -> Tensor:
    low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    flat = high == low
    return torch.where(flat, x, (x - low) / torch.where(flat, 1, high - low))


def _equalize(values: Tensor) -> Tensor:
    """Return levels 0 to 255 spread evenly, in [0, 1], by Pillow's rule in whole numbers."""
    levels = values.long().clamp(0, 255).flatten(-2)
    ones = torch.ones_like(levels)
    counts = torch.zeros_like(levels[..., :1]).expand(*levels.shape[:-1], 256)
    counts = counts.scatter_add(-1, levels, ones)
    below = counts.cumsum(-1) - counts
    last = counts.gather(-1, levels.amax(-1, keepdim=True))
    step = (levels.shape[-1] - last) // 255
    table = (below + step // 2) // step.clamp(min=1)
    spread = torch.where(step > 0, table.gather(-1, levels), levels).clamp(max=255)
    return spread.view(values.shape).to(values.dtype) / 255
