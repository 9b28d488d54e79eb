"""The same question for several signal directions in noise: projecting instead of predicting."""

import math

import torch
from torch import Tensor

from testtime.theory.linear import encoder, mixed


def subspace_errors(
    angle: float,
    alphas: list[float],
    variances: tuple[float, ...] = (6.0, 5.0, 4.0),
    noise: float = 0.5,
    dim: int = 20,
    draws: int = 20_000,
    seed: int = 0,
) -> Tensor:
    """Return squared errors ``[A, draws]`` of projected inputs against their clean signals.

    A signal of as many directions as variances lies in white noise. At test time each direction is
    turned by the angle into a noise axis of its own. An input is projected on the first
    eigenvectors of ``M(a)`` (``S`` with the noise) and held against its signal without the noise.

    Args:
        angle: in radians.
        alphas: each between 0 and 1.
        variances: of the signal's directions, in falling order.
        noise: variance of the white noise, in every direction.
        dim: of the inputs, at least twice the signal's.
        draws: number of inputs.
        seed: of the draws; the same inputs serve all alphas.

    Raises:
        ValueError: the signal's directions have no noise axes of their own.
    """
    k = len(variances)
    if dim < 2 * k:
        raise ValueError(
            f"{k} directions turned into noise axes of their own need {2 * k} dimensions, found "
            f"dim={dim}."
        )
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor(variances, dtype=torch.float64).sqrt()
    signal = scales * torch.randn(draws, k, dtype=torch.float64, generator=generator)
    seen = math.sqrt(noise) * torch.randn(draws, dim, dtype=torch.float64, generator=generator)
    seen[:, :k] += math.cos(angle) * signal
    seen[:, k : 2 * k] += math.sin(angle) * signal
    # Beside the signal's directions all are alike, so M(a) acts within those and one more, that of
    # the rest of the input: inputs and clean signals in these coordinates.
    rest = seen[:, k:].norm(dim=1, keepdim=True)
    along = math.sin(angle) * (signal * seen[:, k : 2 * k]).sum(1, keepdim=True) / rest
    z = torch.cat([seen[:, :k], rest], dim=1)
    clean = torch.cat([math.cos(angle) * signal, along], dim=1)
    outside = signal.square().sum(1) - clean.square().sum(1)
    covariance = torch.diag(torch.tensor([*variances, 0.0], dtype=torch.float64) + noise)
    errors = []
    for alpha in alphas:
        basis = encoder(mixed(covariance, z, alpha), k)
        projected = (basis @ (basis.mT @ z.unsqueeze(-1))).squeeze(-1)
        errors.append((projected - clean).square().sum(1) + outside)
    return torch.stack(errors)
