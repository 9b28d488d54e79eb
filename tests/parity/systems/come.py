"""COME: Tent, EATA and SAR with the entropy of opinions."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.optimizers import momenta
from tests.parity.recording import Config, Recording, Unreplayable
from tests.parity.replay import Adapter
from testtime.adaptation.adapted import Adapted


@dataclass(frozen=True)
class GivenFisher(tt.EATA):
    """EATA whose Fisher information is recorded, and not the data that it is from."""

    needs_source = False


class Come(Adapter):
    """Extras: of the last inner step the base's masks and entropies, its memory, the momentum."""

    presets = ("official", "paper")

    def method(self, config: Config) -> tt.Method:
        """Return the base as the authors' code has it, with the recorded hyper-parameters."""
        base, scale = config.get("base"), math.log(config.get("classes"))
        given: dict[str, Any] = {
            "optimizer": tt.SGD(config.get("lr"), config.get("momentum")),
            "entropy": tt.OpinionEntropy(config.get("prior_mass")),
            "steps": config.get("steps"),
        }
        margins = {name: config.get(name) for name in ("e_margin", "d_margin", "margin_e0")}
        rho, recovery, beta = (config.get(k) for k in ("rho", "reset_constant", "fisher_beta"))
        if base == "tent":
            return tt.Tent.preset("official", "sar", **given)
        if base == "sar":
            given |= {"margin": margins["margin_e0"] / scale, "rho": rho, "recovery": recovery}
            return tt.SAR.preset("official", **given)
        if base != "eata":
            raise Unreplayable(f"its base {base!r} is not known")
        given |= {"margin": margins["e_margin"] / scale, "redundancy": margins["d_margin"]}
        if beta is None:
            return tt.ETA.preset("official", "sar", **given)
        return GivenFisher.preset("official", "sar", strength=beta, **given)

    def started(self, adapted: Adapted, recording: Recording, comparison: Comparison) -> None:
        """Put the recorded Fisher information in."""
        place = "extra/init/fisher"
        fisher = {name: recording[f"{place}/{name}"] for name in recording.under(place)}
        adapted.learner.constants.update(fisher)

    def outputs(self, adapted: Adapted, x: Tensor) -> Mapping[str, Tensor]:
        """Return the loss of every backward, in order; that of nothing is not a number."""
        notes, losses = adapted.notes, adapted.notes["loss"]
        if isinstance(adapted.method, tt.SAR):
            masks = zip(notes["reliable"], notes["still_reliable"], strict=True)
            both = zip(notes["entropy"], notes["sharpest_entropy"], strict=True)
            losses = [
                entropies[mask].mean()
                for pair, of in zip(masks, both, strict=True)
                for mask, entropies in zip(pair, of, strict=True)
            ]
        if isinstance(adapted.method, tt.ETA):
            losses = [loss for loss, kept in zip(losses, notes["kept"], strict=True) if kept.any()]
        return {"loss": torch.stack(losses) if losses else torch.empty(0)}

    def extras(self, adapted: Adapted) -> dict[str, Tensor]:
        """Return the notes of the last inner step, the memory, and the momentum."""
        notes, state = adapted.notes, adapted.learner.state
        found = {"opinion_entropy": notes["entropy"][-1], **momenta(state)}
        if "reliable" in notes:
            found["mask1"] = notes["reliable"][-1]
        if isinstance(adapted.method, tt.SAR):
            recovered = torch.stack(notes["recovered"]).any()
            found |= {"ema": notes["average"][-1], "was_reset": recovered}
        if isinstance(adapted.method, tt.ETA):
            found["current_model_probs"] = state.memory["average"]
            found |= {"num_reliable": state.memory["reliable"]}
            found |= {"num_used": state.memory["selected"]}
        return found

    def facts(self, adapted: Adapted, config: Config) -> dict[str, bool]:
        """Return whether the right parameters adapt."""
        return {"config.params": config.get("params") == list(adapted.learner.state.weights)}

    def replay(self, recording: Recording) -> Comparison:
        """Replay; a threshold that does not fit the number of classes is told, and recorded."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*redundancy.*does not fit", UserWarning)
            return super().replay(recording)


KINDS = {"adapt": Come().replay}
