"""The draws of a recording, made again: numpy's legacy generator, in the recorded order."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor

Draw = Callable[[RandomState, Tensor, Sequence[float]], list[np.ndarray]]


def recorded_draws(
    name: str, constants: Sequence[float], x: Tensor, seed: int, texture: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return the draws for images; the recording seeds anew before each.

    Args:
        name: the corruption.
        constants: of the recorded severity.
        x: the clean images [B, 3, N, N] in [0, 1].
        seed: of the recording.
        texture: the window that frost took, [3, N, N] in levels.
    """
    if name == "frost":
        assert texture is not None
        return (texture.expand(len(x), -1, -1, -1),)
    if name not in _DRAWS:
        return ()
    draws = [_DRAWS[name](RandomState(seed), image, constants) for image in x]
    batched = (torch.from_numpy(np.stack(one)) for one in zip(*draws, strict=True))
    if name == "fog":
        return tuple(one.transpose(0, 1).to(x) for one in batched)
    # Angles stay exact: they fall between pixels.
    return tuple(one.to(x) if one.is_floating_point() and one.ndim > 1 else one for one in batched)


def _normals(random: RandomState, image: Tensor, constants: Sequence[float]) -> list[np.ndarray]:
    return [random.normal(size=(*image.shape[1:], 3)).transpose(2, 0, 1)]


def _counts(random: RandomState, image: Tensor, constants: Sequence[float]) -> list[np.ndarray]:
    # The very means that were recorded: levels over 255 in float64.
    levels = image.double().mul(255).round().permute(1, 2, 0).numpy()
    return [random.poisson(constants[0] * (levels / 255)).transpose(2, 0, 1).astype(np.float64)]


def _impulses(random: RandomState, image: Tensor, constants: Sequence[float]) -> list[np.ndarray]:
    # One draw says which values flip, a second which of them are salt; here one says both.
    size = (*image.shape[1:], 3)
    flips, salt = random.random_sample(size) < constants[0], random.random_sample(size) < 0.5
    quarter = constants[0] / 4
    return [np.where(flips, np.where(salt, quarter, 3 * quarter), 1).transpose(2, 0, 1)]


def _neighbours(random: RandomState, image: Tensor, constants: Sequence[float]) -> list[np.ndarray]:
    _, reach, iterations = (int(c) for c in constants)
    side = image.shape[1] - 2 * reach
    offsets = random.randint(-reach, reach, size=(iterations, side, side, 2)) + reach
    codes = 2 * reach * offsets[..., 1] + offsets[..., 0]
    return [codes[:, ::-1, ::-1].copy()]


def _motion(random: RandomState, image: Tensor, constants: Sequence[float]) -> list[np.ndarray]:
    return [np.array(random.uniform(-45, 45))]


def _snow(random: RandomState, image: Tensor, constants: Sequence[float]) -> list[np.ndarray]:
    return [random.normal(size=image.shape[1:]), np.array(random.uniform(-135, -45))]


def _plasma(random: RandomState, image: Tensor, constants: Sequence[float]) -> list[np.ndarray]:
    levels, n = [], 1
    while n < image.shape[1]:
        levels.append(np.stack([random.uniform(-1, 1, (n, n)) for _ in range(3)]))
        n *= 2
    return levels


def _drops(random: RandomState, image: Tensor, constants: Sequence[float]) -> list[np.ndarray]:
    return [random.normal(size=image.shape[1:])]


def _elastic(random: RandomState, image: Tensor, constants: Sequence[float]) -> list[np.ndarray]:
    points = random.uniform(-1, 1, (3, 2))
    return [points, np.stack([random.uniform(-1, 1, image.shape[1:]) for _ in range(2)])]


_DRAWS: dict[str, Draw] = {
    "gaussian_noise": _normals,
    "speckle_noise": _normals,
    "shot_noise": _counts,
    "impulse_noise": _impulses,
    "glass_blur": _neighbours,
    "motion_blur": _motion,
    "snow": _snow,
    "fog": _plasma,
    "spatter": _drops,
    "elastic_transform": _elastic,
}
