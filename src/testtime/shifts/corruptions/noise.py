"""Noise: gaussian, shot, impulse and speckle."""

import torch
from torch import Tensor

Draws = tuple[Tensor, ...]
Random = torch.Generator | None


def draw_gaussian_noise(x: Tensor, sigma: float, generator: Random) -> Draws:
    """Draw a standard normal for each value of x."""
    return (torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype),)


def gaussian_noise(x: Tensor, sigma: float, normals: Tensor) -> Tensor:
    """Add noise of standard deviation sigma; normals has the shape of x."""
    return torch.add(x, normals, alpha=sigma).clamp_(0, 1)


def draw_shot_noise(x: Tensor, photons: float, generator: Random) -> Draws:
    """Draw how many photons arrive for each value of x."""
    return (torch.poisson(photons * x, generator=generator),)


def shot_noise(x: Tensor, photons: float, counts: Tensor) -> Tensor:
    """Show counted photons, where so many are expected of full brightness."""
    return (counts / photons).clamp_(0, 1)


def draw_impulse_noise(x: Tensor, amount: float, generator: Random) -> Draws:
    """Draw a uniform in [0, 1) for each value of x."""
    return (torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype),)


def impulse_noise(x: Tensor, amount: float, uniforms: Tensor) -> Tensor:
    """Set that share of all values, channel by channel: half of them to 1 and half to 0."""
    changed = torch.where(uniforms < amount, (uniforms < amount / 2).to(x.dtype), x)
    return changed


def draw_speckle_noise(x: Tensor, sigma: float, generator: Random) -> Draws:
    """Draw a standard normal for each value of x."""
    return draw_gaussian_noise(x, sigma, generator)


def speckle_noise(x: Tensor, sigma: float, normals: Tensor) -> Tensor:
    """Add noise of a standard deviation of sigma times the value."""
    return torch.addcmul(x, x, normals, value=sigma).clamp_(0, 1)
