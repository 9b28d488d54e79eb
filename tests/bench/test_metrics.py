"""Each metric against scikit-learn, SciPy or its definition."""

import itertools
import math

import numpy as np
import pytest
import torch

from testtime.bench import metrics

G = torch.Generator().manual_seed(0)
LOGITS, LABELS = 2 * torch.randn(500, 7, generator=G), torch.randint(7, (500,), generator=G)
WRONG = LOGITS.argmax(1) != LABELS


def test_nll_and_brier_are_those_of_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics")
    probabilities = LOGITS.double().softmax(1).numpy()
    assert metrics.nll(LOGITS, LABELS) == pytest.approx(sk.log_loss(LABELS, probabilities))
    one_hot = torch.nn.functional.one_hot(LABELS, 7).bool()
    each = [sk.brier_score_loss(one_hot[:, k], probabilities[:, k]) for k in range(7)]
    assert metrics.brier(LOGITS, LABELS) == pytest.approx(sum(each))


def test_ece_is_its_definition():
    confidence, predicted = LOGITS.double().softmax(1).max(1)
    expected, edges = 0.0, torch.linspace(0, 1, 16)
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            hit = (predicted == LABELS)[inside].double().mean()
            expected += float(inside.sum() * (hit - confidence[inside].mean()).abs()) / 500
    assert metrics.ece(LOGITS, LABELS) == pytest.approx(expected)


def test_a_sure_and_right_answer_has_no_calibration_error():
    assert metrics.ece(1e3 * torch.eye(3), torch.arange(3)) == 0.0


def test_error_by_group():
    found = metrics.error_by(torch.tensor([True, False, True, True]), torch.tensor([4, 4, 7, 7]))
    assert found == {4: 0.5, 7: 1.0}


def test_collapse():
    same, spread = torch.full((10,), 3), torch.arange(10)
    assert (metrics.top_share(same), metrics.histogram_entropy(same)) == (1.0, 0.0)
    assert metrics.top_share(spread) == 0.1
    assert metrics.histogram_entropy(spread) == pytest.approx(math.log(10))


def test_parts_of_a_stream():
    wrong = torch.tensor([True] * 5 + [False] * 5)
    assert metrics.over_stream(wrong, 2) == [1.0, 0.0]
    assert len(metrics.over_stream(wrong, 20)) == 10


def test_the_bootstrap_is_that_of_resampled_images():
    difference = torch.tensor([-1.0] * 30 + [0.0] * 150 + [1.0] * 20)
    draws = np.random.default_rng(1).integers(200, size=(20_000, 200))
    expected = np.quantile(difference.numpy()[draws].mean(1), [0.025, 0.975])
    assert metrics.interval(difference) == pytest.approx(tuple(expected), abs=0.006)
    assert metrics.interval(difference) == metrics.interval(difference)
    assert metrics.interval(torch.ones(9)) == (1.0, 1.0)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30])
def test_students_quantile(freedom):
    stats = pytest.importorskip("scipy.stats")
    for level in (0.9, 0.95):
        quantile = metrics._student(level, freedom)
        assert quantile == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-6)


def test_an_interval_over_seeds():
    assert metrics.seeds_interval([0.2]) is None
    low, high = metrics.seeds_interval([0.1, 0.2, 0.3])
    assert (low + high) / 2 == pytest.approx(0.2)
    assert (high - low) / 2 == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-4)
