"""SAR."""

import math

from torch import Tensor

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.optimizers import optimizer
from tests.parity.recording import Config, Recording, Unreplayable
from tests.parity.replay import Adapter, each_inner
from testtime.adaptation.adapted import Adapted


class SAR(Adapter):
    """Extras: of both forwards, the average, recoveries, the momentum."""

    presets = ("official", "paper")
    complete = r"(ema|loss_second)(\.\d+)?"

    def method(self, config: Config) -> tt.SAR:
        """Return SAR as the authors' code has it, with the recorded hyper-parameters.

        The presets differ in whether the average survives a recovery, which the config says.
        """
        if (rate := config.get("ema_rate", 0.1)) != 0.1:
            raise Unreplayable(f"its average moves at a rate of {rate}, and the library's at 0.1")
        return tt.SAR.preset(
            "official",
            optimizer=optimizer(config, around="SAM over "),
            margin=config.get("margin_factor_of_ln_classes"),
            rho=config.get("rho"),
            recovery=config.get("reset_constant"),
            average_survives=config.get("ema_survives_recovery"),
            survives=("slots",) if config.get("momentum_survives_reset") else (),
            steps=config.get("steps", 1),
        )

    def extras(self, adapted: Adapted) -> dict[str, Tensor | None]:
        """Return the notes, the average, and the momentum of the optimiser inside."""
        notes, state = adapted.notes, adapted.learner.state
        # No prediction is left: the authors' loss is the mean of nothing, and not recorded.
        losses = [
            loss if still.any() else None
            for loss, still in zip(notes["loss"], notes["still_reliable"], strict=True)
        ]
        averages = [None if average.isnan() else average for average in notes["average"]]
        momenta = state.slots.get("momentum_buffer", {})
        return {
            **each_inner("mask_first", notes["reliable"]),
            **each_inner("mask_second", notes["still_reliable"]),
            **each_inner("entropy", notes["entropy"]),
            **each_inner("entropy_second", notes["sharpest_entropy"]),
            **each_inner("logits_second", notes["sharpest_logits"]),
            **each_inner("loss_second", losses),
            **each_inner("recovered", notes["recovered"]),
            **each_inner("ema", averages),
            "ema": averages[-1],
            **{f"momentum.{name}": momentum for name, momentum in momenta.items()},
        }

    def replay(self, recording: Recording) -> Comparison:
        """Replay a recording whose margin is the share of ``ln C`` that its config names."""
        config = recording.config
        for step in recording.steps()[:1]:
            classes = recording[f"out/{step}/logits"].shape[1]
            margin = config.get("margin_factor_of_ln_classes") * math.log(classes)
            if abs(config.get("margin_e0", margin) - margin) > 1e-12:
                raise Unreplayable(f"its margin_e0 is not {margin} with {classes} classes")
        return super().replay(recording)


KINDS = {"adapt": SAR().replay}
