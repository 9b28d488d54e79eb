"""TTT-MAE's loop over images, every inner step held against its recording."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.networks import build
from tests.parity.recording import Config, Recording, Unreplayable
from testtime.adaptation.adapted import Adapted
from testtime.adaptation.optim import SGD, Adam, AdamW
from testtime.models.mae import MAE

_MODES: dict[str, dict[str, Any]] = {
    "encoder": {"trains": "encoder"},
    "all": {"trains": "all"},
    "encoder_no_cls_no_msk": {"trains": "encoder", "tokens": False},
}


class Traced:
    """What every inner step of an adapted model did, step by step of a recording."""

    def __init__(self, recording: Recording, adapted: Adapted) -> None:
        self.recording, self.adapted, self.first = recording, adapted, 0
        self.norms: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []
        learner = adapted.learner
        descend = learner.descend

        def draw(name: str, make: Callable[[torch.Generator], Tensor]) -> Tensor:
            step = self.first + learner.inner
            value = recording[f"draw/{step}/{name.replace('.', '_')}"]
            own = make(torch.Generator())
            if own.shape != value.shape:
                raise LookupError(
                    f"the library draws '{name}' of {[*own.shape]}, the authors {[*value.shape]}"
                )
            return value

        def descending(grads: dict[str, Tensor], when: Tensor | None = None) -> None:
            descend(grads, when)
            assert learner.call is not None
            self.norms.append(torch.stack([g.norm() for g in grads.values()]).norm())
            self.states.append(dict(learner.work.weights))
            with torch.no_grad():
                answer = learner.method.predict(learner.live, learner.call.x, {})
            self.logits.append(answer)

        learner.draw = draw  # type: ignore[method-assign]
        learner.descend = descending  # type: ignore[method-assign]

    def image(self, step: int) -> None:
        """Adapt to the image that a step of the recording begins with."""
        self.first, self.norms, self.logits, self.states = step, [], [], []
        answer = self.adapted(self.recording[f"in/{step}/x"])
        assert torch.equal(answer, self.logits[-1])


def replay_steps(recording: Recording) -> Comparison:
    """Replay the official loop over images, every inner step."""
    config, comparison = recording.config, Comparison(recording)
    if recording.preset not in ("official", "paper"):
        raise Unreplayable(f"its preset '{recording.preset}' is not known")
    for key in ("head_type", "images", "timm", "weight_decay", "blr"):
        config.get(key, None)
    network, method = build(recording), method_of(config)
    assert isinstance(network, MAE)
    comparison.require("config.normalised", network.normalised == config.get("norm_pix_loss"))
    reset = config.get("reset")
    episodic = "batch" if reset == "all" else False
    adapted = tt.adapt(network, method, episodic=episodic)
    trained = sorted(adapted.learner.selected)
    comparison.require("config.trained", trained == sorted(config.get("trained")))
    traced, results, losses = Traced(recording, adapted), [], []
    for first in recording.steps():
        x, y = recording[f"in/{first}/x"], recording[f"in/{first}/y"]
        comparison.check(f"extra/{first}/logits_before", adapted.source(x))
        traced.image(first)
        parts = traced.adapted.notes["losses" if method.accumulate > 1 else "loss"]
        for inner, logits in enumerate(traced.logits):
            step = first + inner
            comparison.check(f"out/{step}/logits", logits)
            comparison.check(f"out/{step}/loss_class", F.cross_entropy(logits, y))
            comparison.check(f"extra/{step}/grad_norm", traced.norms[inner])
            for part, loss in enumerate(parts[inner].reshape(-1)):
                name = f"loss_{part}" if method.accumulate > 1 else "loss"
                comparison.check(f"out/{step}/{name}", loss)
            state = {**network.state_dict(), **traced.states[inner]}
            for name in recording.under(f"state/{step}"):
                comparison.check(f"state/{step}/{name}", state.get(name))
        # The script logs the last part's loss, divided as for the gradient, and 0 or 100.
        losses.append(torch.stack([p.reshape(-1)[-1] / method.accumulate for p in parts]))
        right = [100.0 * (logits.argmax(1) == y).double().mean() for logits in traced.logits]
        results.append(torch.stack(right))
    comparison.check("extra/0/losses_file", torch.stack(losses, 1))
    comparison.check("extra/0/results_file", torch.stack(results, 1))
    return comparison


def method_of(config: Config) -> tt.TTTMAE:
    """Return the method with the recorded hyper-parameters."""
    lr, decay = config.get("lr"), config.get("optimizer_weight_decay")
    betas, momentum = config.get("betas", None), config.get("momentum")
    kind = config.get("optimizer")
    if kind == "sgd":
        optimizer: SGD | Adam = SGD(lr, momentum, weight_decay=decay)
    elif kind in ("adam", "adam_w"):
        optimizer = (Adam if kind == "adam" else AdamW)(lr, tuple(betas), weight_decay=decay)
    else:
        raise Unreplayable(f"its optimiser '{kind}' is not known")
    mode = config.get("finetune_mode")
    if mode not in _MODES:
        raise Unreplayable(f"its finetune_mode '{mode}' is not known")
    return tt.TTTMAE.preset(
        "official",
        optimizer=optimizer,
        steps=config.get("steps"),
        copies=config.get("batch"),
        mask_ratio=config.get("mask_ratio"),
        accumulate=config.get("accum_iter"),
        crops=not config.get("single_crop"),
        restarts=config.get("reset") == "optimizer",
        **_MODES[mode],
    )
