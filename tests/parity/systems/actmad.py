"""ActMAD."""

import warnings

from torch import nn

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.networks import build
from tests.parity.optimizers import optimizer
from tests.parity.recording import Config, Recording, Unreplayable
from testtime.adaptation import select


def method(config: Config) -> tt.ActMAD:
    """Return ActMAD as the authors' code has it, with the recorded hyper-parameters."""
    for name, value in {"loss_factor": 0.5, "optimises": "all parameters"}.items():
        if (found := config.get(name, value)) != value:
            raise Unreplayable(f"its {name} is {found}, and the library's {value}")
    sgd = Config({"optimizer": "SGD"} | {k: config.get(k) for k in _SGD})
    return tt.ActMAD.preset("official", optimizer=optimizer(sgd))


_SGD = ("lr", "momentum", "nesterov", "weight_decay")


def replay(recording: Recording) -> Comparison:
    """Replay tasks one after the other; each batch is adapted on, and another of it answered."""
    config, comparison = recording.config, Comparison(recording)
    if recording.preset != "official":
        raise Unreplayable(f"its preset '{recording.preset}' is not known")
    words = sorted({k.split("/")[0] for k in recording.under("in") if k.startswith("source")})
    adapted = tt.adapt(
        build(recording), method(config), source=[recording[f"in/{word}/x"] for word in words]
    )
    learner = adapted.learner
    for layer in range(len(select.layers(learner.module, (nn.BatchNorm2d,)))):
        for what in ("mean", "var"):
            comparison.check(f"extra/init/{what}/{layer}", learner.constants[f"{what}.{layer}"])
    for step in recording.steps():
        if step in config.get("task_starts"):
            adapted.reset()
        with warnings.catch_warnings():
            # That the classifier, which no activation hangs on, stays as it is.
            warnings.filterwarnings("ignore", r".* stay as they are", UserWarning)
            adapted(recording[f"in/{step}/x"])
        state, notes = learner.state, {k: v[0] for k, v in adapted.notes.items()}
        comparison.check(f"out/{step}/logits", notes["logits"])
        comparison.check(f"out/{step}/loss", notes["loss"])
        comparison.check(f"out/{step}/test_logits", adapted.predict(recording[f"in/{step}/x_test"]))
        for name in ("mean_loss", "var_loss"):
            comparison.check(f"extra/{step}/{name}", notes[name])
        for name in recording.under(f"extra/{step}/opt"):
            weight, _, slot = name.rpartition("/")
            comparison.check(f"extra/{step}/opt/{name}", state.slots[slot][weight])
        held = {**state.buffers, **state.weights}
        for name in recording.under(f"state/{step}"):
            comparison.check(f"state/{step}/{name}", held[name])
    return comparison


KINDS = {"adapt": replay}
