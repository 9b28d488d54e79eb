"""What methods share that learn by a second head, trained jointly with the network."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from testtime.adaptation import select
from testtime.adaptation.core import Method, Net
from testtime.adaptation.twoheads import TwoHeads


@dataclass(frozen=True)
class TwoHeadsMethod(Method):
    """Adapt what the network shares with a second head; a subclass brings the head's task.

    Args:
        head: the head adapts too; without, it is in eval mode and the shared part alone adapts.
        statistics: where it learns, BatchNorm layers normalise with the ``"batch"`` and move their
            running statistics, or stay with the ``"source"``'s.
        train: run everything that adapts in train mode, dropout included.
    """

    head: bool = True
    statistics: Literal["batch", "source"] = "batch"
    train: bool = False

    adapts = "the weights that a network shares with a second head"
    answers = "after"
    task: ClassVar[str] = "does something else"

    def __post_init__(self) -> None:
        """Check the choice of statistics."""
        super().__post_init__()
        if self.statistics not in ("batch", "source"):
            raise ValueError(
                f"{type(self).__name__}(statistics={self.statistics!r}) is not known: use 'batch' "
                "or 'source'."
            )

    def configure(self, module: nn.Module) -> nn.Module:
        """Refuse a network without a second head."""
        if isinstance(module, TwoHeads):
            return module
        raise ValueError(
            f"{type(self).__name__} learns by a second head that {self.task}, trained jointly with "
            f"the network, but the model is {type(module).__name__}. Pass "
            "tt.TwoHeads(network, head, branch=...)."
        )

    def select(self, module: nn.Module) -> list[str]:
        """Return the shared parameters, and the head's."""
        assert isinstance(module, TwoHeads)
        return module.shared() + (select.matching(module, r"^head\.") if self.head else [])

    def learning(self, net: Net) -> Net:
        """Return the network in the modes that it learns in."""
        if self.statistics == "source":
            return net.eval()
        parts = ("net", "head") if self.head else ("net",)
        if self.train:
            return net.train(parts)
        norms = select.layers(net.module, select.BATCH_NORMS)
        return net.train(name for name in norms if name.split(".")[0] in parts)
