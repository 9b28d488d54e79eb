"""Noise: gaussian, shot, impulse and speckle."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

Draws = tuple[Tensor, ...]
Random = torch.Generator | None


# Fewer values than this are drawn sooner than a thread has started.
PARALLEL = 2**19


def normals(shape: Sequence[int], like: Tensor, generator: Random) -> Tensor:
    """Draw standard normals on the device of a tensor, in its dtype."""
    return _in_halves(Tensor.normal_, like.new_empty(shape), generator)


def uniforms(shape: Sequence[int], like: Tensor, generator: Random) -> Tensor:
    """Draw uniforms in [0, 1) on the device of a tensor, in its dtype."""
    return _in_halves(Tensor.uniform_, like.new_empty(shape), generator)


def integers(top: int, shape: Sequence[int], like: Tensor, generator: Random) -> Tensor:
    """Draw whole numbers from 0 to top - 1 on the device of a tensor, int32."""

    def fill(values: Tensor, generator: Random) -> Tensor:
        return values.random_(0, top, generator=generator)

    return _in_halves(fill, like.new_empty(shape, dtype=torch.int32), generator)


def _in_halves(fill: Callable[..., Tensor], values: Tensor, generator: Random) -> Tensor:
    """Fill values at random; many of them on the CPU, where torch draws in one thread, in two.

    What is drawn depends on the generator and the size alone, not on the number of threads.
    """
    if values.device.type != "cpu" or values.numel() < PARALLEL:
        return fill(values, generator=generator)
    seeds = torch.randint(2**63 - 1, (2,), generator=generator).tolist()
    halves = values.view(-1).tensor_split(2)
    with ThreadPoolExecutor(2) as threads:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        list(threads.map(lambda half, own: fill(half, generator=own), halves, generators))
    return values


def draw_gaussian_noise(x: Tensor, sigma: float, generator: Random) -> Draws:
    """Draw a standard normal for each value of x."""
    return (normals(x.shape, x, generator),)


def gaussian_noise(x: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """Add noise of standard deviation sigma; noise has the shape of x."""
    return torch.add(x, noise, alpha=sigma).clamp_(0, 1)


def draw_shot_noise(x: Tensor, photons: float, generator: Random) -> Draws:
    """Draw how many photons arrive for each value of x."""
    counts = photons * x
    return (_in_halves(_poisson, counts, generator),)


def _poisson(means: Tensor, generator: Random) -> Tensor:
    """Put Poisson draws in the place of their means."""
    return means.copy_(torch.poisson(means, generator=generator))


def shot_noise(x: Tensor, photons: float, counts: Tensor) -> Tensor:
    """Show counted photons, where so many are expected of full brightness."""
    return (counts / photons).clamp_(0, 1)


def draw_impulse_noise(x: Tensor, amount: float, generator: Random) -> Draws:
    """Draw a uniform in [0, 1) for each value of x."""
    return (uniforms(x.shape, x, generator),)


def impulse_noise(x: Tensor, amount: float, chances: Tensor) -> Tensor:
    """Set that share of all values, channel by channel: half of them to 1 and half to 0."""
    return torch.where(chances < amount, (chances < amount / 2).to(x.dtype), x)


def draw_speckle_noise(x: Tensor, sigma: float, generator: Random) -> Draws:
    """Draw a standard normal for each value of x."""
    return draw_gaussian_noise(x, sigma, generator)


def speckle_noise(x: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """Add noise of a standard deviation of sigma times the value."""
    return torch.addcmul(x, x, noise, value=sigma).clamp_(0, 1)
