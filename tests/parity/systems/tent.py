"""TENT, and its form for GroupNorm and LayerNorm."""

from torch import Tensor, nn

import testtime as tt
from tests.parity.optimizers import optimizer, slots
from tests.parity.recording import Config, Unreplayable
from tests.parity.replay import Adapter
from testtime.adaptation.adapted import Adapted

_PREFIX = "affine parameters of "


class Tent(Adapter):
    """Extras: the loss of each inner step, and the optimiser's state."""

    def method(self, config: Config) -> tt.Tent:
        """Return TENT as the authors' code has it, with the recorded hyper-parameters."""
        return tt.Tent.preset(
            "official",
            layers=_layers(config.get("norm")),
            optimizer=optimizer(config),
            steps=config.get("steps", 1),
        )

    def extras(self, adapted: Adapted) -> dict[str, Tensor]:
        """Return the losses and the optimiser's state."""
        losses = {f"loss.{k}": loss for k, loss in enumerate(adapted.notes["loss"])}
        return losses | slots(adapted.learner.state)


def _layers(norm: str) -> tuple[type[nn.Module], ...]:
    """Return the classes that a recording spells as words."""
    names = norm.removeprefix(_PREFIX).split(", ")
    if not norm.startswith(_PREFIX) or not all(hasattr(nn, name) for name in names):
        raise Unreplayable(f"its config names no layers by norm={norm!r}")
    return tuple(getattr(nn, name) for name in names)


KINDS = {"adapt": Tent().replay}
