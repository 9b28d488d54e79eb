"""CMA-ES is that of the package cma, told the same candidates."""

import cma
import numpy as np
import pytest
import torch

from testtime.adaptation import evolution


def fitness(x):
    """Return an uneven bowl with ripples."""
    return ((x - 1).square() * torch.arange(1, x.shape[1] + 1)).sum(1) + (3 * x).sin().sum(1)


# 300 dimensions: decomposed every third update.
@pytest.mark.parametrize(
    ("n", "popsize", "gap"), [(8, 27, 1), (8, 10, 1), (48, 27, 1), (300, 27, 3)]
)
def test_updates_as_the_package_does(n, popsize, gap):
    own = evolution.begin(torch.zeros(n, dtype=torch.float64), 0.5)
    options = {"seed": 1, "popsize": popsize, "verbose": -9}
    package = cma.CMAEvolutionStrategy(n * [0.0], 0.5, options)
    assert evolution.constants(n, popsize).gap == gap
    best = torch.full((n,), 5.0, dtype=torch.float64)  # from far away: it is pulled back
    for update in range(8):
        if update and update % gap == 0:
            own = evolution.decomposed(own)
        drawn = torch.tensor(np.array([*package.ask(), best.numpy().copy()]))
        values = fitness(drawn)
        best = drawn[values.argmin()]
        package.tell(list(drawn.numpy().copy()), values.tolist())
        covariance = (own["axes"] * own["scales"].square()) @ own["axes"].T
        own = evolution.updated(own, drawn, values, popsize)
        sampler, size = package.sm, package.adapt_sigma
        wanted = {
            "mean": package.mean,
            "sigma": package.sigma,
            "C": sampler.C,
            "pc": package.pc,
            "ps": size.ps,
        }
        for name, value in wanted.items():
            assert torch.allclose(own[name], torch.as_tensor(value), rtol=1e-10, atol=1e-12), name
        used = torch.tensor(sampler.B * sampler.D**2 @ sampler.B.T)
        assert torch.allclose(covariance, used, atol=1e-12)


def test_samples_have_the_distributions_moments():
    generator = torch.Generator().manual_seed(0)
    state = evolution.begin(torch.zeros(4, dtype=torch.float64), 0.5)
    root = torch.rand(4, 4, dtype=torch.float64, generator=generator)
    state = evolution.decomposed(state | {"C": root @ root.T, "mean": torch.arange(4.0).double()})
    drawn = evolution.sample(state, 100_000, generator)
    assert torch.allclose(drawn.mean(0), state["mean"], atol=0.02)
    assert torch.allclose(drawn.T.cov(), 0.25 * root @ root.T, atol=0.02)


def test_finds_a_minimum():
    generator = torch.Generator().manual_seed(0)
    state = evolution.begin(torch.zeros(6), 1.0)
    for _ in range(80):
        state = evolution.decomposed(state)
        drawn = evolution.sample(state, 12, generator)
        state = evolution.updated(state, drawn, (drawn - 2).square().sum(1), 12)
    assert torch.allclose(state["mean"], torch.full((6,), 2.0), atol=1e-3)
