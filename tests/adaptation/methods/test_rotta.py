"""RoTTA beyond its recordings."""

import copy
import math

import pytest
import torch
from torch import nn

import testtime as tt
from testtime.adaptation.batchnorm import move_statistics_first
from testtime.adaptation.methods._bank import Bank, Item
from testtime.models.tiny import tiny

FEW = tt.RoTTA(capacity=5, every=4)


def bank(items=(), capacity=4, classes=2, seen=None):
    """Return a bank with items of given label and entropy, which came one after another."""
    held = sorted(Item(label, k, entropy, k) for k, (label, entropy) in enumerate(items))
    return Bank(capacity, classes, 1.0, 1.0, held, len(items) if seen is None else seen)


def arrivals(one):
    return [(item.label, item.arrival) for item in one.items]


def test_a_class_has_room_for_its_share():
    one = bank()
    for label in (0, 0, 0, 1):
        one.add(label, 0.1, 9)
    # The third of class 0 took the place of the oldest: of equal entropy it is worse.
    assert arrivals(one) == [(0, 1), (0, 2), (1, 3)]
    assert one.ages() == [3, 2, 1]


def test_the_surest_stay_and_an_unsure_one_is_let_pass():
    one = bank([(0, 0.6), (0, 0.0)])
    one.add(0, 0.1, 9)
    assert arrivals(one) == [(0, 1), (0, 2)]
    one.add(0, math.log(2), 9)
    assert arrivals(one) == [(0, 1), (0, 2)]
    assert one.seen == 4


def test_where_the_bank_is_full_but_the_class_is_not_the_largest_class_makes_way():
    one = bank([(0, 0.1), (0, 0.2), (0, 0.3), (1, 0.5)], capacity=4, classes=3)
    one.add(2, 0.0, 9)
    assert arrivals(one) == [(0, 0), (0, 1), (1, 3), (2, 4)]


def test_more_classes_than_room_leave_one_image_of_each():
    one = bank(capacity=2, classes=10)
    for label in (3, 3, 7, 5):
        one.add(label, 0.1, 9)
    assert len({item.label for item in one.items}) == len(one.items) == 2


def test_a_hundred_thousand_images_overflow_nothing():
    one = bank([(0, 0.1)], seen=10**5)
    one.add(0, 0.1, 9)
    assert len(one.items) == 2


def test_learning_starts_in_the_middle_of_a_batch_and_the_answer_is_from_before():
    model, batches = tiny("batchnorm2d")
    adapted = tt.adapt(model, FEW)
    torch.testing.assert_close(adapted(batches[0]), model(batches[0]))
    assert [int(row) for row in adapted.notes["after"]] == [4]
    assert not torch.allclose(adapted.predict(batches[0]), model(batches[0]))
    adapted(batches[1])
    assert [int(row) for row in adapted.notes["after"]] == [2, 6]
    memory = adapted.snapshot().memory
    assert int(memory["bank.seen"]) == 12
    held = memory["bank.arrival"] >= 0
    stream = torch.cat(batches)
    assert torch.equal(memory["bank.images"][held], stream[memory["bank.arrival"][held]])
    adapted.reset()
    torch.testing.assert_close(adapted(batches[0]), model(batches[0]))
    assert int(adapted.snapshot().memory["bank.seen"]) == 6


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_statistics_move_first_and_gradients_go_through_them(kind):
    torch.manual_seed(0)
    shape = (6, 4) if kind is nn.BatchNorm1d else (6, 4, 3, 3)
    layer = kind(4).double().train()
    nn.init.uniform_(layer.running_var, 0.5, 2)
    nn.init.normal_(layer.running_mean)
    plain, x = copy.deepcopy(layer), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    move_statistics_first(layer, 0.3)

    others = [0, *range(2, x.dim())]
    mean = 0.7 * plain.running_mean + 0.3 * x.mean(others)
    var = 0.7 * plain.running_var + 0.3 * x.var(others, correction=0)
    wide = (-1, *[1] * (x.dim() - 2))
    expected = (x - mean.view(wide)) / (var.view(wide) + plain.eps).sqrt()
    answer, cotangent = layer(x), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(answer, expected)
    grads = (torch.autograd.grad((t * cotangent).sum(), x)[0] for t in (answer, expected))
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(layer.running_mean, mean.detach())
    assert not layer.running_var.requires_grad
    assert layer.training
    moved = layer.running_mean.clone()
    layer.eval()(x)
    assert torch.equal(layer.running_mean, moved)


def test_a_layer_that_does_more_than_normalise_still_does():
    class Rectified(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), Rectified(6), nn.AdaptiveAvgPool2d(1)), nn.Flatten(), nn.Linear(6, 3)
    ).eval()
    adapted = tt.adapt(model, FEW)
    seen = []
    adapted.learner.module[1].register_forward_hook(lambda m, args, out: seen.append(out.min()))
    adapted(torch.rand(4, 3, 8, 8))
    assert min(seen) >= 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tt.RoTTA(capacity=0), r"RoTTA\(capacity=0\)"),
        (lambda: tt.RoTTA(every=0), r"RoTTA\(every=0\)"),
        (lambda: tt.RoTTA(steps=2), "let every be smaller"),
        (lambda: tt.adapt(tiny("groupnorm")[0], FEW), "RoTTA finds nothing to adapt"),
        (
            lambda: tt.adapt(tiny("batchnorm2d")[0], FEW)(torch.randn(2, 3, 8, 8)),
            r"RoTTA augments images in \[0, 1\]",
        ),
        (
            lambda: tt.adapt(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval(), FEW)(
                torch.rand(2, 3, 8, 8)
            ),
            "the logits are dense",
        ),
        (
            lambda: tt.adapt(
                nn.Sequential(nn.Conv2d(3, 1, 8), nn.BatchNorm2d(1), nn.Flatten()).eval(), FEW
            )(torch.rand(2, 3, 8, 8)),
            "one class alone",
        ),
    ],
)
def test_what_it_cannot_work_with(make, said):
    with pytest.raises(ValueError, match=said):
        make()
