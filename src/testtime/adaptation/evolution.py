"""CMA-ES as pure functions: a normal distribution that moves towards the better candidates.

Hansen, The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772, with active covariance update and
the constants of the package cma 4.0, which the tests hold it against.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from testtime.adaptation.optim import Tensors


@dataclass(frozen=True)
class Constants:
    """What follows from the number of dimensions and of candidates, by the tutorial's names.

    Args:
        weights: of the candidates by rank; the first ``mu`` sum to 1, later ones are at most 0.
        mu: how many are positive.
        mueff: how many candidates that is worth.
        cc: rate of the path of the covariance.
        cs: rate of the path of the step size.
        c1: rate of the covariance along its path.
        cmu: rate of the covariance along the candidates.
        damps: damping of the step size.
        chi: expected length of a standard normal vector.
        gap: updates between two decompositions.
    """

    weights: tuple[float, ...]
    mu: int
    mueff: float
    cc: float
    cs: float
    c1: float
    cmu: float
    damps: float
    chi: float
    gap: int


@cache
def constants(n: int, candidates: int) -> Constants:
    """Return the constants for ``n`` dimensions and a number of candidates drawn at once."""
    raw = [math.log((candidates + 1) / 2) - math.log(i + 1) for i in range(candidates)]
    up, down = [w for w in raw if w > 0], [w for w in raw if w <= 0]
    mueff, mueff_down = (sum(w) ** 2 / sum(v * v for v in w) for w in (up, down))
    cc = (4 + mueff / n) / (n + 4 + 2 * mueff / n)
    cs = (mueff + 2) / (n + mueff + 3)
    c1 = 2 / ((n + 1.3) ** 2 + mueff)
    cmu = min(1 - c1, 2 * (mueff - 1.75 + 1 / mueff) / ((n + 2) ** 2 + mueff))
    most = min(1 + c1 / cmu, (1 - c1 - cmu) / (n * cmu), 1 + 2 * mueff_down / (mueff + 2))
    return Constants(
        weights=(*(w / sum(up) for w in up), *(most * w / -sum(down) for w in down)),
        mu=len(up),
        mueff=mueff,
        cc=cc,
        cs=cs,
        c1=c1,
        cmu=cmu,
        damps=1 + cs + 2 * max(0.0, math.sqrt((mueff - 1) / (n + 1)) - 1),
        chi=math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (26 * n * n)),
        gap=max(math.ceil(1 / ((c1 + cmu) * n * 10)), 1),
    )


def begin(like: Tensor, sigma: float) -> Tensors:
    """Return the distribution before the first update: around zero, nearly round.

    Args:
        like: a point ``[N]``; gives dtype and device.
        sigma: the step size to begin with.
    """
    n = len(like)
    variances = (1e-4 * torch.arange(n, dtype=like.dtype, device=like.device) / n).exp()
    return {
        "mean": torch.zeros_like(like),
        "sigma": like.new_tensor(sigma),
        "C": variances.diag(),
        "axes": torch.eye(n, dtype=like.dtype, device=like.device),
        "scales": variances.sqrt(),
        "pc": torch.zeros_like(like),
        "ps": torch.zeros_like(like),
        "updates": torch.zeros((), dtype=torch.int64, device=like.device),
    }


def decomposed(state: Tensors) -> Tensors:
    """Return the distribution with the covariance decomposed again, for sampling."""
    covariance = (state["C"] + state["C"].T) / 2
    values, axes = torch.linalg.eigh(covariance)
    return state | {"axes": axes, "scales": values.clamp(min=0).sqrt()}


def sample(state: Tensors, count: int, generator: torch.Generator) -> Tensor:
    """Return candidates ``[count, N]``."""
    mean = state["mean"]
    shape = (count, len(mean))
    z = torch.randn(shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + state["sigma"] * (z * state["scales"]) @ state["axes"].T


def updated(state: Tensors, candidates: Tensor, fitness: Tensor, drawn: int) -> Tensors:
    """Return the distribution once it was told how good the candidates are.

    Args:
        state: the distribution; its decomposition is that which was sampled with.
        candidates: ``[K, N]``; those after the first ``drawn`` come from elsewhere.
        fitness: ``[K]``, the smaller the better.
        drawn: how many were sampled.
    """
    n, mean, sigma = candidates.shape[1], state["mean"], state["sigma"]
    k = constants(n, drawn)

    def whitened(v: Tensor) -> Tensor:
        return (v @ state["axes"] / state["scales"]) @ state["axes"].T

    # A candidate from elsewhere is pulled back to where samples could be.
    reach = (whitened(candidates - mean).norm(dim=1, keepdim=True) / sigma).clamp(min=1e-20)
    pulled = mean + (candidates - mean) * ((math.sqrt(n) + 2 * n / (n + 2)) / reach).clamp(max=1)
    foreign = torch.arange(len(candidates), device=mean.device) >= drawn
    ordered = torch.where(foreign[:, None], pulled, candidates)[fitness.argsort(stable=True)]

    weights = mean.new_tensor(
        [*k.weights[: k.mu], *[0.0] * (len(candidates) - drawn), *k.weights[k.mu :]]
    )
    moved = weights[: k.mu] @ ordered[: k.mu] - mean
    rate = math.sqrt(k.cs * (2 - k.cs) * k.mueff)
    ps = (1 - k.cs) * state["ps"] + rate / sigma * whitened(moved)
    updates = state["updates"] + 1
    length = ps.square().sum() / (n * (1 - (1 - k.cs) ** (2 * updates.to(ps.dtype))))
    short = (length - 1 < 1 + 4 / (n + 1)).to(ps.dtype)
    c1a = k.c1 * (1 - (1 - short) * k.cc * (2 - k.cc))
    rate = math.sqrt(k.cc * (2 - k.cc) * k.mueff)
    pc = (1 - k.cc) * state["pc"] + short * rate / sigma * moved

    steps = (ordered - mean) / sigma
    lengths = n / (whitened(steps).norm(dim=1) + 1e-9).square()
    each = k.cmu * torch.where(weights < 0, weights * lengths, weights)
    covariance = state["C"] * (1 - c1a - k.cmu * weights.sum())
    covariance = covariance + k.c1 * torch.outer(pc, pc) + (steps.T * each) @ steps
    change = (k.cs / k.damps) * (ps.norm() / k.chi - 1)
    return state | {
        "mean": mean + moved,
        "sigma": sigma * change.clamp(-1, 1).exp(),
        "C": covariance,
        "pc": pc,
        "ps": ps,
        "updates": updates,
    }
