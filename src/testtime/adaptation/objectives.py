"""Objectives: pure functions of logits, classes along dimension 1."""

from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Return the Shannon entropy of each prediction, in nats.

    Args:
        logits: ``[B, C]``, or dense ``[B, C, ...]``; classes along dimension 1.

    Returns:
        ``[B]``, or dense ``[B, ...]``; the dtype of ``logits``. TENT, equation 1.

    Raises:
        ValueError: there is one class alone, whose entropy is always zero.
    """
    if logits.shape[1] < 2:
        raise ValueError(
            f"The logits {list(logits.shape)} have one class alone, whose entropy is always zero: "
            "nothing adapts. Give a logit to each of two classes, such as "
            "torch.cat([z, -z], 1) / 2 for the logit z of a sigmoid."
        )
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean of the values where the boolean mask holds; zero where it holds nowhere."""
    return (values * where).sum() / where.sum().clamp(min=1)
