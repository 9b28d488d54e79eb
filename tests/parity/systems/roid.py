"""ROID."""

import torch
from torch import Tensor

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.optimizers import optimizer, slots
from tests.parity.recording import Config, Recording
from tests.parity.replay import Adapter
from testtime.adaptation.adapted import Adapted


class ROID(Adapter):
    """Extras: which images have weight, the weights, logits before the prior, the running mean."""

    def method(self, config: Config) -> tt.ROID:
        """Return ROID as the authors' code has it, with the recorded hyper-parameters."""
        return tt.ROID.preset(
            "official",
            optimizer=optimizer(config),
            temperature=config.get("temperature"),
            rate=config.get("momentum_src"),
            mean_rate=config.get("momentum_probs"),
            weighting=config.get("use_weighting"),
            consistency=config.get("use_consistency"),
            prior=config.get("use_prior_correction"),
            batch_size=config.get("batch_size"),
        )

    def options(self, recording: Recording) -> dict[str, int]:
        """Return the window of single images."""
        return {"window": recording.config.get("window_length", None) or 0}

    def drawn(self, name: str, inner: int, steps: int) -> str:
        """Return the one name there is."""
        return "aug"

    def extras(self, adapted: Adapted) -> dict[str, Tensor | None]:
        """Return the notes, the running mean, and the optimiser's state."""
        notes, state = adapted.notes, adapted.learner.state
        return {
            **{theirs: notes[ours][-1] for theirs, ours in _NOTES.items() if ours in notes},
            "pointer": torch.tensor(state.seen % (adapted.window or 1)),
            "updated": torch.tensor(state.seen % (adapted.window or 1) == 0),
            "class_probs_ema": state.memory["mean"],
            **slots(state, "opt/{}/{}"),
        }

    def outputs(self, adapted: Adapted, x: Tensor) -> dict[str, Tensor | None]:
        """Return the loss."""
        return {"loss": adapted.notes["loss"][-1]} if "loss" in adapted.notes else {}

    def facts(self, adapted: Adapted, config: Config) -> dict[str, bool]:
        """Return whether the same parameters adapt."""
        names = list(adapted.learner.state.weights)
        return {"config.params": config.get("params", names) == names}

    def replay(self, recording: Recording) -> Comparison:
        """Replay a recording, which has views of the images with weight alone."""
        recording.config.get("num_classes")  # shows in the shape of the logits
        for step in recording.steps():
            path = f"draw/{step}/aug"
            if path in recording:  # as the library has them: rows for all images
                keep = recording[f"extra/{step}/keep"]
                views = recording[path]
                whole = torch.zeros(len(keep), *views.shape[1:], dtype=views.dtype)
                whole[keep] = views
                recording.put(path, whole)
        return super().replay(recording)


_NOTES = {"keep": "keep", "weights": "weights", "raw_logits": "logits"}

KINDS = {"adapt": ROID().replay}
