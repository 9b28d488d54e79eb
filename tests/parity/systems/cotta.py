"""CoTTA, and its chain of augmentations."""

import torch
from torch import Tensor

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.optimizers import optimizer, slots
from tests.parity.recording import Config, Recording, Unreplayable
from tests.parity.replay import Adapter, each_inner
from testtime.adaptation import views
from testtime.adaptation.adapted import Adapted

_LOSSES = {
    "cross-entropy to the teacher": "cross_entropy",
    "half cross-entropy to the teacher plus half reverse cross-entropy": "symmetric",
}
# What the numbers of a view are drawn from: the recording holds the numbers themselves.
_DRAWN_FROM = (
    *("brightness", "contrast", "saturation", "hue", "gamma"),
    *("degrees", "translate", "scale", "sigma", "flip", "noise"),
)

_DRAWN = {
    **{"factors": "factors", "affine": "affine", "flip": "flips", "sigma": "sigmas"},
    "noise": "noise",
}


class CoTTA(Adapter):
    """Extras: confidence, whether views were used, the loss, the teacher, the optimiser's state."""

    presets = ("official", "paper")

    def method(self, config: Config) -> tt.CoTTA:
        """Return CoTTA as the authors' code has it, with the recorded hyper-parameters.

        The presets differ in the loss, which the config says.
        """
        loss = config.get("loss")
        if loss not in _LOSSES:
            raise Unreplayable(f"its loss {loss!r} is not known")
        return tt.CoTTA.preset(
            "official",
            optimizer=optimizer(config),
            threshold=config.get("anchor_threshold"),
            restored=config.get("restore_probability"),
            rate=config.get("teacher_rate"),
            views=config.get("views"),
            loss_form=_LOSSES[loss],
            steps=config.get("steps", 1),
        )

    def taken(self, name: str, value: Tensor) -> Tensor:
        """Return views, which are recorded in bytes, as images in [0, 1]."""
        return value.to(torch.get_default_dtype()) / 255 if name == "views" else value

    def extras(self, adapted: Adapted) -> dict[str, Tensor | None]:
        """Return the notes, the teacher, and the optimiser's state."""
        notes, state, method = adapted.notes, adapted.learner.state, adapted.method
        assert isinstance(method, tt.CoTTA)
        return {
            **each_inner("anchor_confidence", notes["confidence"]),
            **each_inner("augmented", [c < method.threshold for c in notes["confidence"]]),
            **each_inner("loss", notes["loss"]),
            **{f"ema.{name}": weight for name, weight in state.memory.items()},
            **slots(state),
        }


def replay_views(recording: Recording) -> Comparison:
    """Replay the chain on one input, a view for each recorded set of random numbers."""
    config, x, comparison = recording.config, recording["in/x"], Comparison(recording)
    size = x.shape[-1]
    for key, value in {"size": size, "padding": size // 2, "blur_kernel": 5}.items():
        if (recorded := config.get(key, value)) != value:
            raise Unreplayable(f"its {key} is {recorded}, and the library's {value} on this input")
    for key in _DRAWN_FROM:
        config.get(key, None)
    for name in recording.under("out"):
        call = name.removesuffix("/view")
        drawn = {ours: recording[f"draw/{call}/{theirs}"] for theirs, ours in _DRAWN.items()}
        orders = [recording[f"draw/{call}/order"].tolist()]
        one = views.Draws(orders, **{k: t.unsqueeze(0) for k, t in drawn.items()})
        comparison.check(f"out/{name}", views.views(x, one)[0])
    return comparison


KINDS = {"adapt": CoTTA().replay, "operator": replay_views}
