"""ROID beyond its recordings."""

import pytest
import torch
from torch import nn

import testtime as tt
from testtime.models.tiny import ROWS, tiny


def test_the_second_forward_holds_those_with_weight_alone_only_where_rows_couple():
    for kind in ("batchnorm2d", "groupnorm"):
        model, batches = tiny(kind)
        adapted = tt.adapt(model, tt.ROID())
        adapted(batches[0])
        before, kept = adapted.report().forwards, int(adapted.notes["keep"][0].sum())
        adapted(batches[0])
        kept = int(adapted.notes["keep"][0].sum())
        assert 0 < kept < ROWS
        second = kept if adapted.report().couples else ROWS
        assert adapted.report().forwards - before == ROWS + second, kind


def test_equal_images_have_equal_weights_and_nothing_turns_into_nan():
    model, batches = tiny("groupnorm")
    adapted = tt.adapt(model, tt.ROID())
    answer = adapted(batches[0][:1].expand(4, -1, -1, -1))
    assert answer.isfinite().all()
    assert adapted.report().skipped == 0
    # Equal up to rounding, which may tell them apart; where it does not, every weight is e^3.
    weights = adapted.notes["weights"][0]
    assert weights.max() == pytest.approx(torch.e**3)


def test_without_weights_the_mean_stays_and_every_image_counts():
    model, batches = tiny("groupnorm")
    adapted = tt.adapt(model, tt.ROID(weighting=False))
    adapted(batches[0])
    assert adapted.notes["weights"][0].tolist() == [1] * ROWS
    assert adapted.snapshot().memory["mean"].tolist() == pytest.approx([1 / 5] * 5)
    adapted(batches[1][:1])  # one image has nothing to be weighted against, and needs nothing


def test_weights_are_drawn_back_to_the_source():
    model, batches = tiny("groupnorm")
    kept = tt.adapt(model, tt.ROID(rate=0.0))
    kept(batches[0])
    start, state = kept.learner.start.weights, kept.snapshot().weights
    assert all(torch.equal(state[k], start[k]) for k in start)


def test_no_views_no_images():
    model, batches = tiny("batchnorm1d")
    with pytest.raises(ValueError, match="ROID augments colour images"):
        tt.adapt(model, tt.ROID())(batches[0])
    adapted = tt.adapt(model, tt.ROID(consistency=False))
    first = adapted(batches[0])
    assert not torch.equal(adapted(batches[0]), first)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.rand(1, 3, 8, 8), "ROID needs batches of at least 2, but this one has 1"),
        (torch.rand(4, 3, 3, 8), "at least 4 x 4 pixels"),
        (torch.randn(4, 3, 8, 8), r"ROID augments images in \[0, 1\], but these span"),
    ],
)
def test_what_it_cannot_work_on(images, said):
    model, _ = tiny("groupnorm")
    adapted = tt.adapt(model, tt.ROID())
    before = adapted.snapshot()
    with pytest.raises(ValueError, match=said):
        adapted(images)
    assert adapted.snapshot().memory.keys() == before.memory.keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate": 1.5}, r"ROID\(rate=1.5\): it is a share"),
        ({"mean_rate": -1}, r"ROID\(mean_rate=-1\)"),
        ({"temperature": 0}, "the temperature is above 0"),
        ({"batch_size": 0}, "a batch has at least one image"),
    ],
)
def test_bad_hyper_parameters(changes, said):
    with pytest.raises(ValueError, match=said):
        tt.ROID(**changes)


@pytest.mark.parametrize("method", [tt.ROID(), tt.CoTTA(threshold=0.0, views=2)])
def test_dense_logits_are_refused(method):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
    with pytest.raises(ValueError, match="the logits are dense"):
        tt.adapt(model.eval(), method)(torch.rand(4, 3, 8, 8))


def test_a_head_with_batchnorm1d_and_one_image_with_weight():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.BatchNorm1d(6), nn.Linear(6, 4)),
    ).eval()
    with pytest.raises(ValueError, match="Use larger batches"):
        tt.adapt(model, tt.ROID())(torch.rand(2, 3, 8, 8))  # of two, one is below the mean
