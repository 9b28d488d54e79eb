"""What is measured, each a pure function of answers and labels.

Logits are ``[N, C]``, labels ``[N]`` integers, ``wrong`` ``[N]`` booleans; shares are from 0 to 1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 15  # of the calibration error, as in the literature
RESAMPLES = 10_000


def error_by(wrong: Tensor, groups: Tensor) -> dict[int, float]:
    """Return the share of wrong answers in each group (a class, a patient), by its number."""
    return {
        int(group): float(wrong[groups == group].double().mean()) for group in torch.unique(groups)
    }


def nll(logits: Tensor, labels: Tensor) -> float:
    """Return the mean negative log-likelihood of the labels, in nats."""
    return float(torch.nn.functional.cross_entropy(logits.double(), labels))


def brier(logits: Tensor, labels: Tensor) -> float:
    """Return the mean squared distance of the probabilities to the one-hot label, from 0 to 2."""
    probabilities = logits.double().softmax(1)
    target = torch.nn.functional.one_hot(labels, logits.shape[1])
    return float((probabilities - target).square().sum(1).mean())


def ece(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean gap of confidence and accuracy in each bin.

    Bins are of equal width and closed above. Guo et al., arXiv 1706.04599, equation 3.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    surplus = confidence - (predicted == labels).double()
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of.cpu(), surplus.cpu())
    return float(gaps.abs().sum() / len(labels))


def top_share(predicted: Tensor) -> float:
    """Return the share of the class that is predicted most; near 1 the answers have collapsed."""
    return float(predicted.bincount().max()) / len(predicted)


def histogram_entropy(predicted: Tensor) -> float:
    """Return the entropy of the classes predicted, in nats; 0 where all answers are one class."""
    shares = predicted.bincount().double() / len(predicted)
    return float(-torch.special.xlogy(shares, shares).sum()) + 0.0


def over_stream(wrong: Tensor, parts: int = 20) -> list[float]:
    """Return the error in equal parts of the stream, in its order."""
    return [float(part.double().mean()) for part in wrong.tensor_split(min(parts, len(wrong)))]


def interval(values: Tensor, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return a percentile bootstrap interval of the mean of values that take few levels.

    For a paired comparison of two methods the values are the differences, image by image. Drawing
    n values with replacement draws how often each level comes, so that is what is drawn here: a
    binomial number of the first level, of what is left a binomial number of the second, and so on.
    Images are taken to be independent, which in a sorted or repeating stream they are not.

    Args:
        values: ``[N]``, such as 0 and 1.
        level: the share of resamples inside.
        seed: of the resamples.
    """
    generator = torch.Generator().manual_seed(seed)
    levels, counts = torch.unique(values.double().cpu(), return_counts=True)
    left = torch.full((RESAMPLES,), float(len(values)), dtype=torch.float64)
    rest, total = float(len(values)), torch.zeros(RESAMPLES, dtype=torch.float64)
    for value, count in zip(levels, counts, strict=True):
        share = torch.full_like(left, min(float(count) / rest, 1.0))
        drawn = torch.binomial(left, share, generator=generator)
        total += value * drawn
        left, rest = left - drawn, max(rest - float(count), 1.0)
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(total / len(values), edges).tolist()
    return low, high


def seeds_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Return Student's interval of the mean over seeds; none for a single seed."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = _student(level, n - 1) * spread
    return mean - half, mean + half


def _student(level: float, freedom: int) -> float:
    """Return the quantile of Student's t for a two-sided interval, by bisection of its integral."""
    # With y = x^2 / (x^2 + freedom), P(|t| < x) is the regularised incomplete beta function.
    low, high = 0.0, 1e4
    for _ in range(200):
        x = (low + high) / 2
        low, high = (x, high) if _within(x, freedom) < level else (low, x)
    return low


def _within(x: float, freedom: int) -> float:
    """Return P(|t| < x) for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(x / math.sqrt(freedom))
    term, total = (math.cos(angle) if freedom % 2 else 1.0), 0.0
    for k in range(freedom // 2):
        total += term
        odd = 2 * k + (2 if freedom % 2 else 1)
        term *= odd / (odd + 1) * math.cos(angle) ** 2
    if freedom % 2:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
