"""The figures that recordings of corruptions hold, from clean and corrupted images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.shifts.corruptions.filters import LUMINANCE

RINGS, BINS = 8, 32


def figures(corrupted: Tensor, clean: Tensor) -> dict[str, float]:
    """Return every figure, averaged over images ``[B, 3, H, W]`` of whole levels."""
    x, c = corrupted.double() / 255, clean.double() / 255
    found: dict[str, Tensor] = {}
    for i, channel in enumerate("rgb"):
        found[f"mean_{channel}"] = x[:, i].mean((1, 2))
        found[f"std_{channel}"] = x[:, i].flatten(1).std(1, correction=0)
    error = (x - c).flatten(1)
    found["mse"] = (error**2).mean(1)
    found["psnr"] = -10 * torch.log10(found["mse"].clamp(min=1e-6))
    found["mad"] = error.abs().mean(1)
    grey, clean_grey = luminance(x), luminance(c)
    bins = (255 * grey / 8 + 1e-9).floor().clamp(max=BINS - 1)
    for k in range(BINS):
        found[f"hist_{k:02}"] = (bins == k).double().mean((1, 2))
    difference = grey - clean_grey
    power = rings(difference)
    for k in range(RINGS):
        found[f"power_{k}"] = power[:, k]
    found["ssim"] = ssim(grey, clean_grey)
    found["corr"] = correlation(x.flatten(1), c.flatten(1))
    found["shift2"] = difference.mean((1, 2)) ** 2
    pairs = len(x) // 2 * 2
    flat = difference.flatten(1)[:pairs]
    found["pair_corr"] = correlation(flat[0::2], flat[1::2])
    return {name: float(value.mean()) for name, value in found.items()}


def luminance(x: Tensor) -> Tensor:
    """Return the grey images ``[B, H, W]``."""
    return torch.einsum("bchw,c->bhw", x, torch.tensor(LUMINANCE, dtype=x.dtype))


def rings(difference: Tensor) -> Tensor:
    """Return the power in eight rings of frequency ``[B, 8]``, without the mean."""
    _, height, width = difference.shape
    power = torch.fft.fft2(difference).abs() ** 2 / (height * width) ** 2
    down, across = (torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width))
    ring = (16 * torch.hypot(down[:, None], across)).long().clamp(max=RINGS - 1)
    power[:, 0, 0] = 0
    sums = torch.zeros(len(difference), RINGS, dtype=torch.float64)
    return sums.index_add(1, ring.flatten(), power.flatten(1))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the structural similarity of grey images: Gaussian window 11 x 11, sigma 1.5."""
    offsets = torch.arange(-5.0, 6.0, dtype=torch.float64)
    taps = torch.exp(-(offsets**2) / 4.5)
    taps = taps / taps.sum()

    # A matrix a side: row i holds the window's taps from pixel i on.
    down, across = (
        torch.stack([F.pad(taps, [i, side - 11 - i]) for i in range(side - 10)])
        for side in x.shape[1:]
    )

    def smooth(z: Tensor) -> Tensor:
        return down @ z @ across.T

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    first, second = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + first) * (2 * covariance + second)
    return (top / ((mean_x**2 + mean_y**2 + first) * (var_x + var_y + second))).mean((1, 2))


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return Pearson's correlation of rows, 0 where one is constant."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    norm = x.norm(dim=1) * y.norm(dim=1)
    return torch.where(norm > 1e-12, (x * y).sum(1) / norm.clamp(min=1e-12), 0)
