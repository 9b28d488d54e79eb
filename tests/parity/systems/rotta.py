"""RoTTA."""

import torch
from torch import Tensor

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.optimizers import optimizer, slots
from tests.parity.recording import Config, Recording, Unreplayable
from tests.parity.replay import Adapter
from testtime.adaptation.adapted import Adapted


class RoTTA(Adapter):
    """Extras: the teacher, the bank, what each update worked on, the optimiser's state."""

    def method(self, config: Config) -> tt.RoTTA:
        """Return RoTTA as the authors' code has it, with the recorded hyper-parameters."""
        if (steps := config.get("steps", 1)) != 1:
            raise Unreplayable(f"it takes {steps} steps an update, and the library one")
        return tt.RoTTA.preset(
            "official",
            optimizer=optimizer(config),
            capacity=config.get("memory_size"),
            every=config.get("update_frequency"),
            rate=1 - config.get("nu"),
            momentum=config.get("alpha"),
            timeliness=config.get("lambda_t"),
            uncertainty=config.get("lambda_u"),
        )

    def drawn(self, name: str, inner: int, steps: int) -> str:
        """Return the recorded name of the view in an update."""
        return name.replace("views", "aug")

    def extras(self, adapted: Adapted) -> dict[str, Tensor | None]:
        """Return the teacher, the bank, the notes of each update, and the optimiser's state."""
        notes, state = adapted.notes, adapted.learner.state
        memory = state.memory
        held = memory["bank.arrival"] >= 0
        count = len(notes.get("after", ()))
        found: dict[str, Tensor | None] = {
            "mem.index": memory["bank.arrival"][held],
            "mem.label": memory["bank.label"][held],
            "mem.uncertainty": memory["bank.uncertainty"][held],
            "mem.age": memory["bank.seen"] - memory["bank.arrival"][held],
            "updates": torch.tensor(count),
        }
        for theirs, ours in _NOTES.items():
            found |= {f"update.{k}.{theirs}": notes[ours][k] for k in range(count)}
        teacher = {k: t for k, t in memory.items() if k.startswith("teacher.")}
        found |= {f"ema.{k.removeprefix('teacher.')}": t for k, t in teacher.items()}
        return found | slots(state)

    def facts(self, adapted: Adapted, config: Config) -> dict[str, bool]:
        """Return whether the same parameters adapt."""
        names = list(adapted.learner.state.weights)
        return {"config.adapted": config.get("adapted", names) == names}

    def replay(self, recording: Recording) -> Comparison:
        """Replay a recording; the number of classes shows in its logits."""
        recording.config.get("classes")
        return super().replay(recording)


_NOTES = {"index": "arrival", "age": "age", "weight": "weight", "loss": "loss", "after": "after"}

KINDS = {"adapt": RoTTA().replay}
