"""JPEG, there and back: baseline with halved chroma, as libjpeg's defaults, without the library.

Every step keeps the integers of libjpeg as floats, so that batches run on any device. Its cosines
have 13 bits: a coefficient on the edge between two steps may fall to the other side here.

Source: ITU-T T.81 (tables of Annex K, discrete cosine transform of A.3.3); JFIF 1.02 (colours).
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# T.81, tables K.1 and K.2: steps of quantisation by frequency, rows downwards.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99,) * 8] * 4,
)


def jpeg_compression(x: Tensor, quality: float) -> Tensor:
    """Save as JPEG of that quality, 1 to 100, and read again; the result is on 8-bit levels."""
    height, width = x.shape[-2:]
    luma, chroma = _to_ycc((255 * x).round_())
    chroma = _halve(chroma)
    luma = _code_blocks(luma, _steps(_LUMINANCE, quality))
    chroma = _code_blocks(chroma, _steps(_CHROMINANCE, quality))
    chroma = _double(chroma[..., : (height + 1) // 2, : (width + 1) // 2])
    return _to_rgb(luma, chroma[..., :height, :width]).div_(255)


def _to_ycc(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Return luma [B, 1, H, W] and chroma [B, 2, H, W] in levels, in fixed point of 16 bits."""
    luma = _mix(rgb, (19595, 38470, 7471), 32768)
    blueness = _mix(rgb, (-11059, -21709, 32768), 8388608 + 32767)
    redness = _mix(rgb, (32768, -27439, -5329), 8388608 + 32767)
    return luma, torch.cat([blueness, redness], dim=1)


def _to_rgb(luma: Tensor, chroma: Tensor) -> Tensor:
    rgb = luma.expand(-1, 3, -1, -1).clone()
    chroma = chroma - 128
    for channel, weights in enumerate(((0, 91881), (-22554, -46802), (116130, 0))):
        rgb[:, channel, None] += _mix(chroma, weights, 32768)
    return rgb.clamp_(0, 255)


def _mix(planes: Tensor, weights: Sequence[int], constant: int) -> Tensor:
    """Return a weighted sum of planes, in 65536ths, rounded down to whole levels."""
    mixed = torch.full_like(planes[:, :1], constant)
    for channel, weight in enumerate(weights):
        if weight:
            mixed.add_(planes[:, channel, None], alpha=weight)
    return mixed.div_(65536).floor_()


def _halve(chroma: Tensor) -> Tensor:
    """Return the means of 2 x 2 pixels; halves are rounded down and up in turn along a row."""
    chroma = _pad(chroma, rows=2, columns=16)
    left, right = chroma[..., 0::2], chroma[..., 1::2]
    sums = left + right
    sums = sums[..., 0::2, :] + sums[..., 1::2, :]
    sums[..., 0::2] += 1
    sums[..., 1::2] += 2
    return sums.div_(4).floor_()


def _double(chroma: Tensor) -> Tensor:
    """Enlarge twice with weights 3 and 1 for the near and the far pixel; the edges repeat."""
    padded = F.pad(chroma, [0, 0, 1, 1], mode="replicate")
    near = 3 * chroma
    rows = torch.stack([near + padded[..., :-2, :], near + padded[..., 2:, :]], dim=3).flatten(2, 3)
    padded = F.pad(rows, [1, 1, 0, 0], mode="replicate")
    near = 3 * rows
    # 8 and 7 round halves up and down in turn.
    left, right = near.add(padded[..., :-2]).add_(8), near.add_(padded[..., 2:]).add_(7)
    return torch.stack([left, right], dim=4).flatten(3).div_(16).floor_()


def _code_blocks(levels: Tensor, steps: Tensor) -> Tensor:
    """Return what is left of levels after their blocks' frequencies are rounded to steps.

    The transforms round after each of their two passes, as the integer ones of libjpeg do. What
    floats leave below a whole number is given back before each floor.
    """
    height, width = levels.shape[-2:]
    padded = _pad(levels, rows=8, columns=8)
    batch, channels, rows, columns = padded.shape
    blocks = padded.view(batch, channels, rows // 8, 8, columns // 8, 8)
    # [row in the block, column in the block, all blocks], so that a pass is one product.
    block = blocks.permute(3, 5, 0, 1, 2, 4).reshape(8, 8, -1).sub_(128)
    cosines = _cosines().to(levels)
    steps = steps.to(levels)[..., None]
    block = (4 * cosines @ block).add_(0.5 + 1e-3).floor_()
    block = _along_rows(cosines / 4, block).add_(0.5 + 2e-3).floor_()
    kept = block.abs().add_(4 * steps).div_(8 * steps).floor_().mul_(steps)
    block = kept.copysign_(block)
    block = _along_rows(4 * cosines.T, block).add_(0.5 + 2e-3).floor_()
    block = (cosines.T / 32 @ block).add_(0.5 + 1e-3).floor_()
    block = block.add_(128).clamp_(0, 255)
    blocks = block.view(8, 8, batch, channels, rows // 8, columns // 8).permute(2, 3, 4, 0, 5, 1)
    return blocks.reshape(padded.shape)[..., :height, :width]


def _along_rows(matrix: Tensor, block: Tensor) -> Tensor:
    return (matrix @ block.view(8, -1)).view_as(block)


@functools.lru_cache(maxsize=1)
def _cosines() -> Tensor:
    """Return sqrt(8) times the orthonormal DCT-II, row k for frequency k, float64."""
    k, n = torch.arange(8.0, dtype=torch.float64)[:, None], torch.arange(8.0, dtype=torch.float64)
    cosines = math.sqrt(2) * torch.cos(math.pi * k * (2 * n + 1) / 16)
    cosines[0] = 1
    return cosines


def _steps(table: tuple[tuple[int, ...], ...], quality: float) -> Tensor:
    """Return the table scaled to a quality, as libjpeg does."""
    scale = int(5000 / quality) if quality < 50 else int(200 - 2 * quality)
    return (torch.tensor(table) * scale + 50).div(100, rounding_mode="floor").clamp(1, 255)


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """Repeat the last row and column up to multiples."""
    below, right = -x.shape[-2] % rows, -x.shape[-1] % columns
    return F.pad(x, [0, right, 0, below], mode="replicate") if below or right else x
