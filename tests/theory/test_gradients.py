"""The diagnostic: gradients of both tasks, and whether they tell the gain."""

import pytest
import torch
from torch import nn

import testtime as tt
from testtime.models.mae import MAE, Sizes
from testtime.theory import align


class Two(nn.Module):
    """Shared features, a classifier, and a number to predict."""

    def __init__(self):
        super().__init__()
        self.shared, self.head, self.own = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.shared(x).tanh())


def self_supervised(model, x):
    return model.own(model.shared(x).tanh()).square().mean()


def test_products_tell_the_gain_of_a_small_step():
    torch.manual_seed(0)
    model, rate = Two().double(), 1e-4
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    model.own.weight.requires_grad_(False)
    names = ["shared.weight", "shared.bias"]

    def step(image):
        weights = {name: p for name, p in model.named_parameters() if name in names}
        with torch.enable_grad():
            grads = torch.autograd.grad(self_supervised(model, image), list(weights.values()))
        moved = {k: w - rate * g for (k, w), g in zip(weights.items(), grads, strict=True)}
        return torch.func.functional_call(model, moved, image)

    found = align(model, x, y, self_supervised, step, names)
    torch.testing.assert_close(found.gain, rate * found.product, rtol=0.02, atol=1e-8)
    assert found.correlation > 0.999
    assert found.error == pytest.approx(38**-0.5)
    assert bool((found.cosine.abs() <= 1).all())
    assert not model.own.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_on_a_masked_autoencoder():
    torch.manual_seed(0)
    sizes = Sizes(16, 1, 2)
    mae = MAE(12, 4, sizes, Sizes(8, 1, 2), head=sizes, classes=3, normalised=True).eval()
    adapted = tt.adapt(mae, tt.TTTMAE(copies=2, steps=1), episodic="batch")
    order = torch.rand(4, 9).argsort(1)

    def loss(model, x):
        return model.reconstruct(x, order).loss

    x, y = torch.rand(4, 3, 12, 12), torch.tensor([0, 1, 2, 0])
    found = align(mae, x, y, loss, adapted, adapted.learner.selected)
    assert found.product.shape == found.gain.shape == (4,)
    assert bool(found.product.isfinite().all())


def test_bad_input():
    model, x = Two(), torch.randn(4, 6)
    for images, labels, names in (
        (x[:2], torch.zeros(2), ["shared.weight"]),
        (x, torch.zeros(3), ["shared.weight"]),
        (x, torch.zeros(4), []),
        (x, torch.zeros(4), ["body.weight"]),
    ):
        with pytest.raises(ValueError, match="at least three images with a label each"):
            align(model, images, labels.long(), self_supervised, model, names)
