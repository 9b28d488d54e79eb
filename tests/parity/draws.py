"""Recorded random values, handed out where the library would draw its own."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.recording import Recording, Unreplayable
from testtime.adaptation.learner import Learner

Rename = Callable[[str, int, int], str]
Convert = Callable[[str, Tensor], Tensor]


class Draws:
    """The random values of one recording; replaces ``draw`` of a learner.

    Args:
        recording: holds them as ``draw/<step>/<name>``.
        rename: from the library's name, the inner step and their number to the recorded name.
        convert: from the library's name and the recorded value to what the library takes.
    """

    def __init__(self, recording: Recording, rename: Rename, convert: Convert) -> None:
        self._recording, self._rename, self._convert = recording, rename, convert
        self._calls: Counter[str] = Counter()
        self._stepping = False
        self.step = 0
        self.places: dict[str, str] = {}  # of values that are recorded elsewhere, by their names

    def __deepcopy__(self, memo: dict[int, Any]) -> "Draws":
        """Return this very object: the learner's copies of the network read the same masks."""
        return self

    def follow(self, learner: Learner) -> None:
        """Give this learner the recorded values from now on."""
        adapt = learner.adapt

        def stepping(*args: Any, **kwargs: Any) -> Tensor:
            self._calls.clear()
            self._stepping = True
            try:
                return adapt(*args, **kwargs)
            finally:
                self._stepping = False

        def draw(name: str, make: Callable[[torch.Generator], Tensor]) -> Tensor:
            recorded = self._rename(name, learner.inner, learner.method.steps)
            value = self._convert(name, self._value(recorded))
            own = make(torch.Generator(value.device))
            if own.shape != value.shape:
                raise LookupError(
                    f"the library draws '{name}' of shape {[*own.shape]}, which the authors' code "
                    f"drew of shape {[*value.shape]}"
                )
            return value

        learner.adapt = stepping  # type: ignore[method-assign]
        learner.draw = draw  # type: ignore[method-assign]

    def mask(self, module: str) -> Tensor | None:
        """Return the mask of a module's next call; none outside of a step.

        A library looks at a first batch by forwards of its own before it adapts. The authors' code
        made none, so they read no masks.
        """
        if not self._stepping:
            return None
        call = self._calls[module]
        self._calls[module] += 1
        return self._value(f"dropout.{module}.{call}")

    def _value(self, name: str) -> Tensor:
        path = self.places.get(name, f"draw/{self.step}/{name}")
        if path not in self._recording:
            raise LookupError(f"the library draws '{path}', which the authors' code did not")
        return self._recording[path]


class MaskedDropout(nn.Module):
    """Dropout by recorded masks; in eval mode it does nothing."""

    def __init__(self, name: str, rate: float, draws: Draws) -> None:
        super().__init__()
        self.name, self.rate, self.draws = name, rate, draws

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` where the mask keeps it, scaled up, and zero elsewhere."""
        mask = self.draws.mask(self.name) if self.training else None
        if mask is None:
            return x
        return x * mask / (1 - self.rate) if self.rate < 1 else torch.zeros_like(x)


def put_masks(network: nn.Module, recording: Recording, draws: Draws) -> None:
    """Put modules that read recorded masks in place of those that drop at random."""
    names = [name for step in recording.steps() for name in recording.under(f"draw/{step}")]
    masked = {  # of dropout.<module>.<call>
        name.split(".", 1)[1].rsplit(".", 1)[0] for name in names if name.startswith("dropout.")
    }
    for name, module in list(network.named_modules()):
        rate = _rate(module)
        if rate or (name in masked and rate is not None):
            network.set_submodule(name, MaskedDropout(name, rate, draws))
            masked.discard(name)
    if masked:
        raise Unreplayable(f"it has masks of modules that drop nothing: {sorted(masked)}")


def _rate(module: nn.Module) -> float | None:
    if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
        return module.p
    if type(module).__name__ == "DropPath":  # timm's stochastic depth
        return float(vars(module)["drop_prob"] or 0.0)
    return None
