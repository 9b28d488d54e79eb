"""Fixed position tables: sines and cosines of a patch's column and row."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_table(dim: int, rows: int, columns: int) -> Tensor:
    """Return the fixed table ``[1 + rows * columns, dim]`` in float64; row 0, of no patch, is zero.

    With ``q = dim / 4`` frequencies ``w_j = 10000^(-j/q)``, the patch in grid row r and column c
    has, the column first, ``[sin(c w) | cos(c w) | sin(r w) | cos(r w)]``; patches lie row by row.

    Raises:
        ValueError: ``dim`` is not divisible by 4, or there is no patch.

    Source: He et al., "Masked autoencoders are scalable vision learners", CVPR 2022; the official
    code rounds the table to float32 before it enters a network.
    """
    if dim < 4 or dim % 4:
        raise ValueError(
            f"A position table has a sine and a cosine of two coordinates, but its width is {dim}. "
            "Choose a width that is divisible by 4."
        )
    if rows < 1 or columns < 1:
        raise ValueError(f"A position table of {rows} x {columns} patches has none. Give a grid.")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    angles = [x.reshape(-1, 1) * frequencies for x in (column, row)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([table.new_zeros(1, dim), table])


def resize_table(
    table: Tensor, grid: tuple[int, int], to: tuple[int, int], prefix: int = 1
) -> Tensor:
    """Return a table ``[1, prefix + rows * columns, D]`` for another grid, resized bicubically.

    Args:
        table: a stored table.
        grid: its rows and columns.
        to: the rows and columns wanted.
        prefix: entries before those of the patches (class token, registers); they stay as they are.

    Raises:
        ValueError: the table does not belong to that grid.
    """
    if table.dim() != 3 or table.shape[1] != prefix + grid[0] * grid[1]:
        raise ValueError(
            f"A table of shape {[*table.shape]} is not [1, {prefix} + {grid[0]} * {grid[1]}, D]. "
            "Give the grid that the table was made for."
        )
    head, patches = table[:, :prefix], table[:, prefix:]
    image = patches.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=to, mode="bicubic", align_corners=False)
    return torch.cat([head, image.flatten(2).transpose(1, 2)], dim=1)
