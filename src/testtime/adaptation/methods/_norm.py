"""What methods share that adapt the scales and shifts of normalisation layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from testtime.adaptation import objectives, select
from testtime.adaptation.batchnorm import use_batch_statistics
from testtime.adaptation.core import Method, Net
from testtime.adaptation.optim import Tensors


@dataclass(frozen=True)
class NormMethod(Method):
    """Adapt the scales and shifts of normalisation layers; a subclass brings the loss.

    Args:
        layers: the kinds of layers whose scales and shifts adapt, subclasses included.
        statistics: BatchNorm layers use the ``"batch"``'s own mean and biased variance, or stay
            with the ``"source"``'s (which works on single samples).
        train: run the whole network in train mode, dropout included.
    """

    layers: tuple[type[nn.Module], ...] = select.NORMS
    statistics: Literal["batch", "source"] = "batch"
    train: bool = False

    adapts = "the scales and shifts of normalisation layers"

    def __post_init__(self) -> None:
        """Check the choice of statistics."""
        super().__post_init__()
        if self.statistics not in ("batch", "source"):
            raise ValueError(
                f"{type(self).__name__}(statistics={self.statistics!r}) is not known: use 'batch' "
                "or 'source'."
            )

    def configure(self, module: nn.Module) -> nn.Module:
        """Make BatchNorm layers normalise with the batch, in train and in eval mode."""
        if self.statistics == "batch":
            use_batch_statistics(module, self.layers)
        return module

    def select(self, module: nn.Module) -> list[str]:
        """Return the scales and shifts of the norm layers."""
        return select.norm_affine(module, self.layers)

    def answering(self, net: Net, memory: Tensors) -> Net:
        """Return the network in the modes that it adapts in."""
        return net.train() if self.train else net


@dataclass(frozen=True)
class EntropyMethod(NormMethod):
    """Adapt them by an entropy of the predictions.

    Args:
        entropy: from logits ``[B, C]`` to ``[B]``: Shannon's, or another such as
            :class:`OpinionEntropy` (COME).
    """

    entropy: Callable[[Tensor], Tensor] = objectives.entropy

    def configure(self, module: nn.Module) -> nn.Module:
        """Refuse a Hugging Face model that says it is trained for something else than classes."""
        task = getattr(getattr(module, "config", None), "problem_type", None)
        if task == "multi_label_classification":
            found = "The model's configuration says problem_type='multi_label_classification'"
            raise ValueError(objectives.MULTI_LABEL.format(found=found))
        if task == "regression":
            raise ValueError(
                f"{type(self).__name__} descends an entropy of classes, but the model's "
                "configuration says problem_type='regression'. Use a method without an entropy, "
                "such as BNAdapt or ActMAD."
            )
        return super().configure(module)
