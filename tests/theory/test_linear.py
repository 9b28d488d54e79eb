"""Closed forms against eigen-solvers and draws, and the published table within its errors."""

import math

import pytest
import torch

from testtime.theory import (
    Setting,
    encoder,
    mixed,
    prediction,
    ratio_needed,
    simulate,
    slope_at_zero,
    why_none,
)

ALPHAS = [0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1]
# Risks for d = 10, s1 = 10, s2 = 1, w = 1 of 400000 draws, standard error about 0.003; uniform:
# of 20000, 0.015.
TABLE = {
    0.0: [0.000, 0.025, 0.049, 0.121, 0.235, 0.347, 0.461, 0.714, 1.283, 1.590],
    0.2: [0.166, 0.160, 0.157, 0.173, 0.250, 0.349, 0.459, 0.712, 1.287, 1.595],
    0.4: [0.369, 0.353, 0.339, 0.311, 0.316, 0.374, 0.464, 0.709, 1.300, 1.612],
    0.6: [0.630, 0.606, 0.584, 0.523, 0.460, 0.456, 0.505, 0.723, 1.331, 1.647],
    0.8: [0.955, 0.927, 0.899, 0.816, 0.695, 0.622, 0.614, 0.780, 1.397, 1.714],
    1.0: [1.339, 1.312, 1.283, 1.190, 1.027, 0.890, 0.818, 0.920, 1.538, 1.851],
    None: [2.653, 2.656, 2.659, 2.669, 2.687, 2.726, 2.798, 3.088, 3.803, 4.105],
}


def test_the_best_linear_autoencoder_is_pca() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, dtype=torch.float64, generator=generator) * torch.arange(1.0, 7.0)
    covariance = x.T @ x / len(x)

    def error(basis: torch.Tensor) -> torch.Tensor:
        return (x - x @ basis @ basis.T).square().sum(1).mean()

    best = encoder(covariance, 2)
    lost = torch.linalg.eigvalsh(covariance)[:-2].sum()
    torch.testing.assert_close(error(best), lost, rtol=1e-10, atol=0)
    for _ in range(50):
        other = best + 0.1 * torch.randn(6, 2, dtype=torch.float64, generator=generator)
        assert error(torch.linalg.qr(other).Q) > lost


@pytest.mark.parametrize("alpha", [0.0, 0.03, 0.3, 0.9, 1.0])
def test_the_closed_form_is_the_first_eigenvector_s(alpha: float) -> None:
    generator = torch.Generator().manual_seed(1)
    setting = Setting(7, 4.0, 0.5, weight=-2.0)
    z = torch.randn(200, 7, dtype=torch.float64, generator=generator)
    covariance = torch.diag(torch.tensor([4.0, *[0.5] * 6], dtype=torch.float64))
    first = encoder(mixed(covariance, z, alpha)).squeeze(-1)
    first = first * first[:, :1].sign()
    expected = setting.weight * (first * z).sum(1)
    closed = prediction(z[:, 0], z[:, 1:].norm(dim=1), alpha, setting)
    torch.testing.assert_close(closed, expected, rtol=1e-10, atol=1e-10)


def test_unequal_variances_leave_the_plane() -> None:
    z = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    covariance = torch.diag(torch.tensor([4.0, 2.0, 0.5], dtype=torch.float64))
    first = encoder(mixed(covariance, z, 0.3)).squeeze(-1)
    closed = prediction(z[0], z[1:].norm(), 0.3, Setting(3, 4.0, 1.25))
    assert abs(float(first @ z * first[0].sign()) - float(closed)) > 1e-2


@pytest.mark.parametrize("angle", TABLE)
def test_the_table_comes_out_within_its_errors(angle: float | None) -> None:
    curve = simulate(angle, ALPHAS, draws=50_000, seed=0)
    published = torch.tensor(TABLE[angle], dtype=torch.float64)
    theirs = 0.015 if angle is None else 0.003
    # Four errors of the difference, and the last digit that was printed.
    allowed = 4 * (curve.error**2 + theirs**2).sqrt() + 0.0005
    assert bool(((curve.risk - published).abs() <= allowed).all())


def test_bias_and_variance_apart() -> None:
    # At t = 0.6: slope, residual variance, squared error.
    published = {
        0.0: (0.825, 0.319, 0.624),
        0.1: (0.965, 0.331, 0.343),
        0.2: (1.067, 0.395, 0.440),
        0.5: (1.236, 2.134, 2.689),
        1.0: (1.270, 2.899, 3.624),
    }
    curve = simulate(0.6, list(published), draws=100_000, seed=0)
    squared = curve.bias + curve.variance
    found = torch.stack([curve.slope, curve.variance, squared], 1)
    expected = torch.tensor(list(published.values()), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.003)
    assert bool((curve.variance.diff() > 0).all())
    crossing = simulate(0.6, [0.12, 0.13, 0.14], draws=100_000, seed=0)
    assert int(crossing.bias.argmin()) == 1


@pytest.mark.parametrize("angle", [0.3, 0.9, 1.4])
def test_the_fixed_model_in_closed_form(angle: float) -> None:
    setting = Setting(5, 6.0, 2.0, weight=1.5)
    curve = simulate(angle, [0.0], setting, draws=200_000, seed=2)
    spread = 6.0 * (1 - math.cos(angle)) ** 2 + 2.0 * math.sin(angle) ** 2
    risk = 1.5 * math.sqrt(2 / math.pi * spread)
    assert abs(float(curve.risk[0]) - risk) < 4 * float(curve.error[0])
    assert float(curve.slope[0]) == pytest.approx(math.cos(angle), abs=0.01)
    residual = 1.5**2 * 2.0 * math.sin(angle) ** 2
    assert float(curve.variance[0]) == pytest.approx(residual, rel=0.02)


@pytest.mark.parametrize("error", ["absolute", "squared"])
@pytest.mark.parametrize(("angle", "ratio"), [(0.0, 10), (0.7, 3), (1.5, 10), (2.0, 4)])
def test_the_slope_at_zero_is_that_of_the_draws(angle: float, ratio: float, error: str) -> None:
    setting, step, seed = Setting(10, 2.0 * ratio, 2.0, weight=-0.5), 1e-4, 3
    curve = simulate(angle, [0.0, step], setting, draws=400_000, seed=seed)
    if error == "absolute":
        slope, chance = -curve.gain[1] / step, 4 * curve.gain_error[1] / step
    else:
        squared = curve.bias + curve.variance
        slope, chance = squared.diff()[0] / step, torch.tensor(0.15)
    closed = slope_at_zero(angle, setting, error)  # type: ignore[arg-type]
    assert abs(float(slope) - closed) <= float(chance) + 0.01 * abs(closed) + 0.01


def test_the_published_slope_and_thresholds() -> None:
    assert slope_at_zero(1.5, Setting()) == pytest.approx(-0.2531, abs=5e-5)
    published = {
        **{0.2: 1.680, 0.4: 1.722, 0.6: 1.802, 0.8: 1.939},
        **{1.0: 2.182, 1.2: 2.666, 1.4: 4.031, 1.5: 6.635},
    }
    for angle, ratio in published.items():
        assert ratio_needed(angle, 10) == pytest.approx(ratio, abs=5e-4)
        assert slope_at_zero(angle, Setting(10, 1.001 * ratio, 1.0)) < 0
        assert slope_at_zero(angle, Setting(10, 0.999 * ratio, 1.0)) > 0
        assert ratio_needed(angle, 10**6) == pytest.approx(1 + 1 / math.cos(angle), rel=1e-4)
    assert [ratio_needed(angle, 10) for angle in (0.0, math.pi / 2, 2.0)] == [math.inf] * 3


@pytest.mark.parametrize(
    ("angle", "best"),
    [(0.2, 0.02), (0.4, 0.07), (0.6, 0.13), (0.8, 0.18), (1.0, 0.215), (1.2, 0.23), (1.5, 0.175)],
)
def test_the_optimum_is_interior_for_moderate_rotations(angle: float, best: float) -> None:
    near = [0.0, *(best + shift for shift in (-0.03, -0.015, 0.0, 0.015, 0.03) if best + shift > 0)]
    curve = simulate(angle, near, draws=100_000, seed=0)
    assert curve.best == pytest.approx(best, abs=0.016)
    assert float(curve.gain.max()) > 4 * float(curve.gain_error[curve.gain.argmax()])
    assert why_none(angle, Setting()) is None


@pytest.mark.parametrize(
    ("angle", "ratio", "reason"),
    [
        (0.0, 10, "not turned"),
        (None, 10, "uniform"),
        (math.pi / 2, 10, "90 degrees"),
        (2.2, 2, "90 degrees"),
        (0.8, 1.8, "too weak: s1/s2 = 1.8 of 1.939 needed"),
    ],
)
def test_four_cases_have_no_optimum(angle: float | None, ratio: float, reason: str) -> None:
    setting = Setting(10, ratio, 1.0)
    curve = simulate(angle, [i / 40 for i in range(41)], setting, draws=20_000, seed=0)
    assert curve.best == 0.0
    assert reason in str(why_none(angle, setting))


def test_beside_the_threshold_only_the_curve_tells() -> None:
    # At t = 1.545 the risk rises from 0, and yet falls below it at 0.12.
    assert slope_at_zero(1.545, Setting()) == pytest.approx(0.058, abs=5e-4)
    curve = simulate(1.545, [0.0, 0.12], draws=1_500_000, seed=0)
    assert abs(float(curve.gain[1]) - 0.0110) < 4 * math.hypot(0.0007, float(curve.gain_error[1]))
    assert curve.best == 0.12


def test_training_only_stretches() -> None:
    generator = torch.Generator().manual_seed(0)
    c, b = torch.randn(2, 1000, dtype=torch.float64, generator=generator)
    sizes = torch.stack([prediction(c, b.abs(), a / 20, Setting()) for a in range(21)])
    assert bool((sizes.sign() == c.sign()).all())
    assert bool((sizes.abs().diff(dim=0) >= -1e-12).all())
    torch.testing.assert_close(sizes[-1], c.sign() * torch.hypot(c, b), rtol=1e-12, atol=0)


def test_draws_are_told_by_their_seed() -> None:
    first, again, other = (simulate(0.6, [0.1], draws=100, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.risk, again.risk)
    assert not torch.equal(first.risk, other.risk)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least two dimensions"):
        Setting(dim=1)
    with pytest.raises(ValueError, match="first variance above"):
        Setting(first=1.0, others=1.0)
    for alphas, draws in (([1.5], 10), ([], 10), ([0.5], 1)):
        with pytest.raises(ValueError, match="alphas between 0 and 1"):
            simulate(0.3, alphas, draws=draws)
