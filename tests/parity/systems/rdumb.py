"""RDumb: ETA, and a reset of its own."""

from dataclasses import replace

import torch
from torch import Tensor

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.recording import Config, Recording
from tests.parity.systems.eata import ETA
from testtime.adaptation.adapted import Adapted


class RDumb(ETA):
    """Extras: ETA's, and whether the method's own reset fell before the step."""

    kind = tt.RDumb
    ignored = {r"extra/\d+/index": "the library counts batches since the last reset"}  # noqa: RUF012

    def method(self, config: Config) -> tt.ETA:
        """Return RDumb with the recorded hyper-parameters."""
        return replace(super().method(config), reset_every=config.get("reset_every"))

    def resets(self, recording: Recording) -> set[int]:
        """Return none: the method resets by itself."""
        return set()

    def started(self, adapted: Adapted, recording: Recording, comparison: Comparison) -> None:
        """Set the count of batches, with all else fresh."""
        super().started(adapted, recording, comparison)
        done = recording.config.get("start_index", 0)
        adapted.learner.state.batch = done % recording.config.get("reset_every")

    def extras(self, adapted: Adapted) -> dict[str, Tensor | None]:
        """Return ETA's, and whether this was the first batch since a reset."""
        first = torch.tensor(adapted.learner.state.batch == 1)
        return {**super().extras(adapted), "reset": first}


KINDS = {"adapt": RDumb().replay}
