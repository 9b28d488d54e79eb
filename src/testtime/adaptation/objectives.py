"""Objectives: pure functions of logits, classes along dimension 1."""

from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Return the Shannon entropy of each prediction, in nats.

    Args:
        logits: ``[B, C]``, or dense ``[B, C, ...]``; classes along dimension 1.

    Returns:
        ``[B]``, or dense ``[B, ...]``; the dtype of ``logits``. TENT, equation 1.
    """
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean of the values where the boolean mask holds; zero where it holds nowhere."""
    return (values * where).sum() / where.sum().clamp(min=1)
