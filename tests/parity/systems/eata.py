"""ETA and EATA, and EATA's Fisher pass alone."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.networks import build
from tests.parity.optimizers import optimizer, slots
from tests.parity.recording import Config, Recording, Unreplayable
from tests.parity.replay import Adapter, each_inner
from testtime.adaptation.adapted import Adapted, adapt


class ETA(Adapter):
    """Extras: masks, cosines, the average, counts, the optimiser's state."""

    complete = r"(probs|cosine)(\.\d+)?"
    kind: type[tt.ETA] = tt.ETA

    def method(self, config: Config) -> tt.ETA:
        """Return the method as the authors' code has it, with the recorded hyper-parameters."""
        if (rate := config.get("probs_rate", 0.1)) != 0.1:
            raise Unreplayable(f"its average moves at a rate of {rate}, and the library's at 0.1")
        strength = config.get("fisher_alpha", 0.0)
        regularised = config.get("regularised", False)
        return (tt.EATA if regularised else self.kind).preset(
            "official",
            "sar",
            optimizer=optimizer(config),
            margin=config.get("e_margin_factor_of_ln_classes", 0.4),
            redundancy=config.get("d_margin"),
            steps=config.get("steps", 1),
            **({"strength": strength} if regularised else {}),
        )

    def options(self, recording: Recording) -> dict[str, Any]:
        """Return the batches of the Fisher pass."""
        return {"source": batches} if (batches := source(recording, "in/0")) else {}

    def started(self, adapted: Adapted, recording: Recording, comparison: Comparison) -> None:
        """Compare the Fisher information."""
        compare_fisher(adapted, recording, comparison, "in/0")
        for step in recording.steps()[:1]:
            classes = recording[f"out/{step}/logits"].shape[1]
            margin = adapted.method.margin * math.log(classes)
            if abs(recording.config.get("e_margin", margin) - margin) > 1e-12:
                raise Unreplayable(f"its e_margin is not {margin} with {classes} classes")

    def extras(self, adapted: Adapted) -> Mapping[str, Tensor | None]:
        """Return the notes, the memory, and the momentum."""
        notes, state = adapted.notes, adapted.learner.state
        # The authors have no average before the first prediction that is kept.
        averages = [average if average.any() else None for average in notes["average"]]
        cosines = [cosine if cosine.any() else None for cosine in notes["cosine"]]
        return {
            **each_inner("entropy", notes["entropy"]),
            **each_inner("mask_reliable", notes["reliable"]),
            **each_inner("mask_selected", notes["kept"]),
            **each_inner("cosine", cosines),
            **each_inner("probs", averages),
            "probs": averages[-1],
            "num_reliable": state.memory["reliable"],
            "num_selected": state.memory["selected"],
            **slots(state),
        }


def source(recording: Recording, place: str) -> list[Tensor]:
    """Return the batches of the Fisher pass, in their order."""
    names = [name for name in recording.under(place) if name.startswith("source.")]
    order = sorted(names, key=lambda name: int(name.removeprefix("source.")))
    return [recording[f"{place}/{name}"] for name in order]


def compare_fisher(
    adapted: Adapted, recording: Recording, comparison: Comparison, place: str
) -> None:
    """Compare the Fisher information of every tensor that is recorded under ``place``."""
    for name in recording.under(place):
        if name.startswith("fisher."):
            value = adapted.learner.constants.get(name.removeprefix("fisher."))
            comparison.check(f"{place}/{name}", value)


def fisher(recording: Recording) -> Comparison:
    """Replay the Fisher pass alone."""
    config, comparison = recording.config, Comparison(recording)
    batches = source(recording, "in")
    for key, known in (
        ("batches", len(batches)),
        ("label", "own argmax"),
        ("loss", "mean cross-entropy of the batch"),
    ):
        if config.get(key, known) != known:
            raise Unreplayable(f"its {key} is not {known}")
    adapted = adapt(build(recording), tt.EATA.preset("official"), source=batches)
    compare_fisher(adapted, recording, comparison, "out")
    return comparison


KINDS = {"adapt": ETA().replay, "operator": fisher}
