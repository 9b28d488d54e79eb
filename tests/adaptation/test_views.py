"""The chain of augmentations beyond its recordings."""

import pytest
import torch

from testtime.adaptation import views

ORDER = [0, 1, 2, 3, 4]


def view(x, drawn, **padding):
    """Return the one view there is."""
    return views.views(x, drawn, **padding)[0]


def still(**changes):
    """Return draws that leave an image as it is."""
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    affine = torch.tensor([0.0, 0.0, 0.0, 1.0])
    drawn = {"factors": factors, "affine": affine, "flips": torch.tensor(False), **changes}
    return views.Draws([ORDER], **{k: t.unsqueeze(0) for k, t in drawn.items()})


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 6), (32, 32)])
def test_draws_that_do_nothing(size):
    x = torch.rand(2, 3, *size)
    assert torch.allclose(view(x, still()), x, atol=1e-6)
    blurred = still(sigmas=torch.tensor(0.001), noise=torch.zeros(2, 3, *size))
    assert torch.allclose(view(x, blurred), x, atol=1e-6)


@pytest.mark.parametrize("size", [(5, 7), (8, 6)])
def test_whole_pixels_and_what_lies_beyond_the_border(size):
    x = torch.rand(2, 3, *size)
    moved = still(affine=torch.tensor([0.0, 1.0, 0.0, 1.0]))
    repeated, mirrored = (view(x, moved, padding=kind) for kind in ("replicate", "reflect"))
    for moved_one in (repeated, mirrored):
        assert torch.allclose(moved_one[..., 1:], x[..., :-1], atol=1e-6)
    assert torch.allclose(repeated[..., 0], x[..., 0], atol=1e-6)
    assert torch.allclose(mirrored[..., 0], x[..., 1], atol=1e-6)


def test_a_flip_and_the_noise_after_it():
    x, noise = torch.rand(1, 3, 8, 8), 0.01 * torch.randn(1, 3, 8, 8)
    drawn = still(flips=torch.tensor(True), sigmas=torch.tensor(0.001), noise=noise)
    expected = (x.flip(-1) + noise).clamp(0, 1)
    assert torch.allclose(view(x, drawn), expected, atol=1e-6)


def test_rolls_of_the_dice_are_those_of_the_generator():
    x = torch.rand(2, 3, 8, 8)
    one, two = (views.many(x, 3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (3, 2, 3, 8, 8)
    assert 0 <= one.min() <= one.max() <= 1
    plain = views.draws(x, [ORDER], torch.Generator(), blur=False)
    assert plain.sigmas is None
    assert plain.noise is None


def test_views_made_together_are_those_made_alone():
    x = torch.rand(2, 3, 8, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = views.draws(x, views.draw_orders(x, 7, generator), generator)
    assert len({tuple(order) for order in drawn.orders}) > 1
    together = views.views(x, drawn)
    for k in range(7):
        numbers = (drawn.factors, drawn.affine, drawn.flips, drawn.sigmas, drawn.noise)
        alone = views.Draws([drawn.orders[k]], *(t[k : k + 1] for t in numbers))
        torch.testing.assert_close(view(x, alone), together[k], rtol=1e-12, atol=1e-12)


def test_places_of_pixels_are_exact_in_half_precision():
    x = torch.rand(1, 3, 64, 64)
    moved = still(affine=torch.tensor([10.0, 7.0, 5.0, 1.05]))
    half = view(x.bfloat16(), moved)
    assert half.dtype == torch.bfloat16
    assert (half.float() - view(x.bfloat16().float(), moved)).abs().max() < 1 / 128
    drawn = views.draw_mixtures(x, 8, "padded", torch.Generator().manual_seed(0))
    for some, others in zip(
        views.mixture_chains(x.bfloat16(), drawn),
        views.mixture_chains(x.bfloat16().float(), drawn),
        strict=True,
    ):
        assert (some.float() - others).abs().max() < 1 / 128
