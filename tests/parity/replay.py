"""The loop over the steps of a recorded adaptation, shared by all systems of kind ``adapt``."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from tests.parity.draws import Draws, put_masks
from tests.parity.errors import Comparison
from tests.parity.networks import build
from tests.parity.recording import Config, Recording, Unreplayable
from testtime.adaptation.adapted import Adapted, adapt
from testtime.adaptation.core import Method


class Adapter:
    """What one system's recordings call things; a system overrides what differs.

    Whatever is recorded has to be read, here or by the loop, or named in ``ignored``: the tool
    refuses a file of which anything is left over.
    """

    presets: ClassVar[tuple[str, ...]] = ("official",)
    # Tensors that are not compared: the whole name as a regular expression, and the reason.
    ignored: ClassVar[dict[str, str]] = {}
    # Extras that are recorded whenever they exist, as a regular expression of their names: where
    # one is absent, the library must have none either.
    complete: ClassVar[str] = ""

    def method(self, config: Config) -> Method:
        """Return the method with the recorded hyper-parameters."""
        raise NotImplementedError

    def prepare(self, network: nn.Module, config: Config) -> nn.Module:
        """Return the network, changed before it is adapted where the method cannot be told to."""
        return network

    def options(self, recording: Recording) -> dict[str, Any]:
        """Return further arguments of ``adapt()``, such as source data."""
        return {}

    def resets(self, recording: Recording) -> set[int]:
        """Return the steps before which ``reset()`` is called from outside."""
        return recording.resets()

    def drawn(self, name: str, inner: int, steps: int) -> str:
        """Return the recorded name of what the library draws as ``name`` in an inner step."""
        return of_inner(name, inner, steps)

    def taken(self, name: str, value: Tensor) -> Tensor:
        """Return a recorded random value in the form that the library takes it."""
        return value

    def extras(self, adapted: Adapted) -> Mapping[str, Tensor | None]:
        """Return the method's own state after a step, by recorded names; what it lacks is none."""
        return {}

    def outputs(self, adapted: Adapted) -> Mapping[str, Tensor | None]:
        """Return what came out of a step beside its logits, such as the loss, by recorded names."""
        return {}

    def facts(self, adapted: Adapted, config: Config) -> dict[str, bool]:
        """Return whether what the config says beside numbers is so, by name."""
        names = list(adapted.learner.state.weights)
        return {"config.adapted": config.get("adapted", names) == names}

    def replay(self, recording: Recording) -> Comparison:
        """Replay a recording and compare everything that it holds."""
        if recording.preset not in self.presets:
            raise Unreplayable(f"its preset '{recording.preset}' is not known")
        config, draws = recording.config, Draws(recording, self.drawn, self.taken)
        network = build(recording)
        put_masks(network, recording, draws)
        # An episodic file lists a reset before every step; those are for the library to make.
        episodic = config.get("episodic", False) or recording.mode == "episodic"
        resets = set() if episodic else self.resets(recording)
        adapted = adapt(
            self.prepare(network, config),
            self.method(config),
            episodic="batch" if episodic else False,
            **self.options(recording),
        )
        draws.follow(adapted.learner)
        comparison = Comparison(recording)
        for fact, holds in self.facts(adapted, config).items():
            comparison.require(fact, holds)
        for pattern in self.ignored:
            recording.ignore(pattern)
        for step in recording.steps():
            draws.step = step
            if step in resets:
                adapted.reset()
            logits = adapted(recording[f"in/{step}/x"])
            comparison.check(f"out/{step}/logits", logits)
            _check_state(comparison, recording, step, adapted)
            for name, output in self.outputs(adapted).items():
                if (path := f"out/{step}/{name}") in recording:
                    comparison.check(path, output)
            for name, extra in self.extras(adapted).items():
                path = f"extra/{step}/{name}"
                if path in recording:
                    comparison.check(path, extra)
                elif re.fullmatch(self.complete, name):
                    comparison.require(path, extra is None)
        return comparison


def of_inner(name: str, inner: int, steps: int) -> str:
    """Return the recorded name of what belongs to one inner step, where there are several."""
    head, dot, tail = name.partition(".")
    return name if steps == 1 else f"{head}.{inner}{dot}{tail}"


def each_inner(name: str, values: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """Return what was noted at each inner step, by its recorded names."""
    return {of_inner(name, k, len(values)): value for k, value in enumerate(values)}


def _check_state(comparison: Comparison, recording: Recording, step: int, adapted: Adapted) -> None:
    learner = adapted.learner
    # What adapts lives in the state; what stands still is in the module alone.
    state = {**learner.module.state_dict(), **learner.state.buffers, **learner.state.weights}
    for name in recording.under(f"state/{step}"):
        comparison.check(f"state/{step}/{name}", state.get(name))
