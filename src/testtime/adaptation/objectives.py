"""Objectives: pure functions of logits, classes along dimension 1."""

from dataclasses import dataclass

from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Return the Shannon entropy of each prediction, in nats.

    Args:
        logits: ``[B, C]``, or dense ``[B, C, ...]``; classes along dimension 1.

    Returns:
        ``[B]``, or dense ``[B, ...]``; the dtype of ``logits``. TENT, equation 1.

    Raises:
        ValueError: there is one class alone, whose entropy is always zero; or these are no logits
            but probabilities, of classes or of several labels.
    """
    _require_classes(logits)
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


@dataclass(frozen=True)
class OpinionEntropy:
    """The entropy of each prediction as a subjective opinion, in nats; COME, arXiv 2410.10894.

    Logits are evidence: class ``k`` has the belief ``b_k = exp(z_k) / (S + M)``, and what no class
    is sure of is the uncertainty ``u = M / (S + M)``, with ``S`` the sum of all ``exp(z_k)``. The
    entropy is that of ``(b_1, ..., b_C, u)``; ``1e-7`` is added to each. No gradient goes along the
    logits themselves, so that their norm cannot grow.

    Args:
        mass: ``M``; none: the number of classes, as the paper has it. The authors' code takes 1000
            whatever the classes; with few of them uncertainty then outweighs all else.
    """

    mass: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return ``[B]``, or dense ``[B, ...]``, for logits ``[B, C]`` or ``[B, C, ...]``."""
        _require_classes(logits)
        norm: Tensor = logits.norm(dim=1, keepdim=True)
        evidence = (logits / norm * norm.detach()).exp()
        mass = float(logits.shape[1] if self.mass is None else self.mass)
        total = evidence.sum(1, keepdim=True) + mass
        belief, uncertainty = evidence / total + 1e-7, mass / total + 1e-7
        return -(belief * belief.log()).sum(1) - (uncertainty * uncertainty.log()).squeeze(1)


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean of the values where the boolean mask holds; zero where it holds nowhere."""
    return (values * where).sum() / where.sum().clamp(min=1)


def _require_classes(logits: Tensor) -> None:
    if logits.shape[1] < 2:
        raise ValueError(
            f"The logits {list(logits.shape)} have one class alone, whose entropy is always zero: "
            "nothing adapts. Give a logit to each of two classes, such as "
            "torch.cat([z, -z], 1) / 2 for the logit z of a sigmoid; a regression model takes "
            "methods without an entropy, such as BNAdapt or ActMAD."
        )
    # By what computed them: their values may be what logits are, too.
    made = "" if logits.grad_fn is None else logits.grad_fn.name()
    if made.startswith("SoftmaxBackward"):
        raise ValueError(
            "The model's answers come out of a softmax, so they are probabilities and no logits. "
            "Adapt a model that returns what goes into it."
        )
    if made.startswith("SigmoidBackward"):
        raise ValueError(MULTI_LABEL.format(found="The model's answers come out of a sigmoid"))


MULTI_LABEL = (
    "{found}: they are several labels an image, each of which may hold, and entropy methods are "
    "published for one label an image. Use a method without an entropy, such as BNAdapt or ActMAD; "
    "or choose for yourself that each label is two classes along dimension 1 [B, 2, labels], such "
    "as by logits=lambda z: torch.stack([z, -z], 1) / 2 for logits z."
)
