"""Changes of colour as torchvision makes them; factors broadcast against ``[..., 3, H, W]``."""

import torch
from torch import Tensor


def gray(x: Tensor) -> Tensor:
    """Return the luma ``[..., 1, H, W]`` of images ``[..., 3, H, W]``."""
    red, green, blue = x.unbind(-3)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(-3)


def _blend(x: Tensor, other: Tensor, f: Tensor) -> Tensor:
    return (f * x + (1 - f) * other).clamp(0, 1)


def brightness(x: Tensor, f: Tensor) -> Tensor:
    """Return images times ``f``."""
    return (f * x).clamp(0, 1)


def contrast(x: Tensor, f: Tensor) -> Tensor:
    """Return images away from their mean gray by ``f``."""
    return _blend(x, gray(x).mean((-3, -2, -1), keepdim=True), f)


def saturation(x: Tensor, f: Tensor) -> Tensor:
    """Return images away from their own gray by ``f``."""
    return _blend(x, gray(x), f)


def gamma(x: Tensor, f: Tensor) -> Tensor:
    """Return images to the power of ``f``."""
    return (x.clamp(1e-8, 1) ** f).clamp(0, 1)


def hue(x: Tensor, f: Tensor) -> Tensor:
    """Turn the hue by ``f`` turns, in float32 whatever the images are, as torchvision does."""
    red, green, blue = x.float().unbind(-3)
    high, low = x.float().amax(-3), x.float().amin(-3)
    gray = high == low
    span = high - low
    saturation = span / torch.where(gray, 1, high)
    divisor = torch.where(gray, 1, span)
    r, g, b = ((high - c) / divisor for c in (red, green, blue))
    hue = torch.where(high == red, b - g, torch.where(high == green, 2 + r - b, 4 + g - r))
    hue = ((hue / 6 + 1).fmod(1) + f.float().squeeze(-3)).remainder(1)
    sector = (6 * hue).floor()
    rest = 6 * hue - sector
    v = high
    p = (v * (1 - saturation)).clamp(0, 1)
    q = (v * (1 - saturation * rest)).clamp(0, 1)
    w = (v * (1 - saturation * (1 - rest))).clamp(0, 1)
    sector = sector.long() % 6
    rows = ((v, q, p, p, w, v), (w, v, v, q, p, p), (p, p, w, v, v, q))
    turned = [torch.stack(row).gather(0, sector.unsqueeze(0)).squeeze(0) for row in rows]
    return torch.stack(turned, -3).to(x.dtype)
