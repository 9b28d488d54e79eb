"""Three directions in noise, and the window of a video."""

import math

import pytest
import torch

from testtime.theory import best_window, encoder, excess_loss, mixed, subspace_errors


@pytest.mark.parametrize(("angle", "best"), [(0.0, 0.0), (0.3, 0.02), (0.6, 0.08), (0.9, 0.15)])
def test_the_best_share_grows_with_the_angle(angle: float, best: float) -> None:
    # Published: 0, 0.02, 0.07 (0.1 on a coarse grid), 0.15.
    alphas = [0.0, 0.02, 0.05, 0.08, 0.11, 0.15, 0.2]
    errors = subspace_errors(angle, alphas, draws=4000, seed=0)
    assert alphas[int(errors.mean(1).argmin())] == best
    if best:
        gain = errors[0] - errors[alphas.index(best)]
        assert gain.mean() > 4 * gain.std() / math.sqrt(len(gain))


def test_the_few_coordinates_give_what_all_give() -> None:
    angle, noise, dim, alpha = 0.7, 0.5, 9, 0.1
    errors = subspace_errors(angle, [alpha], (6.0, 5.0, 4.0), noise, dim, draws=50, seed=4)
    generator = torch.Generator().manual_seed(4)
    scales = torch.tensor([6.0, 5.0, 4.0], dtype=torch.float64).sqrt()
    signal = scales * torch.randn(50, 3, dtype=torch.float64, generator=generator)
    white = math.sqrt(noise) * torch.randn(50, dim, dtype=torch.float64, generator=generator)
    clean = torch.zeros(50, dim, dtype=torch.float64)
    clean[:, :3], clean[:, 3:6] = math.cos(angle) * signal, math.sin(angle) * signal
    covariance = torch.diag(torch.tensor([6.0, 5, 4, *[0] * 6], dtype=torch.float64) + noise)
    z = clean + white
    basis = encoder(mixed(covariance, z, alpha), 3)
    projected = (basis @ (basis.mT @ z.unsqueeze(-1))).squeeze(-1)
    expected = (projected - clean).square().sum(1)
    torch.testing.assert_close(errors[0], expected, rtol=1e-9, atol=1e-9)


def test_noise_axes_of_their_own_need_room() -> None:
    with pytest.raises(ValueError, match="need 6 dimensions, found dim=5"):
        subspace_errors(0.3, [0.1], dim=5)


def test_the_best_window_has_the_lowest_bound() -> None:
    for motion, noise, smoothness in ((0.1, 2.0, 1.0), (0.03, 1.0, 3.0)):
        best = best_window(motion, noise, smoothness)
        at = [excess_loss(k, motion, noise, smoothness) for k in (0.9 * best, best, 1.1 * best)]
        assert at[1] < min(at[0], at[2])
    assert excess_loss(2, 0.5, 3.0, 2.0, 4.0) == pytest.approx((4 * 4 * 0.25 + 9 / 2) / 8)
    assert best_window(8.0, 4.0) == pytest.approx(0.5)


@pytest.mark.parametrize("odd", [{"motion": 0.0}, {"noise": -1.0}, {"window": math.nan}])
def test_constants_are_positive(odd: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(odd))):
        excess_loss(**{"window": 4.0, "motion": 0.1, "noise": 1.0, **odd})
