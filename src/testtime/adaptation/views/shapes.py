"""Crops and turns, for TTT (1909.13231); what destroys shapes, for DeYO (2403.07366)."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
