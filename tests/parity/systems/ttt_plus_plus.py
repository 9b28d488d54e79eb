"""TTT++: a contrastive task, and moments aligned with the source's."""

from typing import Any

import torch
from torch import Tensor

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.networks import build, own_name
from tests.parity.recording import Config, Recording, Unreplayable
from testtime.adaptation.adapted import Adapted, adapt

_PARTS = {"features": "ext", "head": "ssh"}
_DIVERGENCES = {"all": ("coral", "mmd"), "coral": ("coral",), "mmd": ("mmd",)}


def _method(config: Config) -> tt.TTTpp:
    """Return TTT++ as the authors' code has it, with the recorded hyper-parameters."""
    for what, known in (("base_temperature", 0.07), ("mmd_factor", 0.5)):
        if (found := config.get(what, known)) != known:
            raise Unreplayable(f"its {what} is {found}, and the library's {known}")
    kind, epoch = config.get("method"), config.get("batches_per_epoch")
    warmup = config.get("bnepoch") * epoch
    parts = [part for part, name in _PARTS.items() if config.get(f"align_{name}", True)]
    kept = config.get("queue_size") - config.get("batch_size_align")
    return tt.TTTpp.preset(
        "official",
        optimizer=tt.SGD(config.get("lr"), config.get("momentum")),
        head=not config.get("fix_ssh"),
        contrast=kind in ("ssl", "both"),
        align=tuple(parts) if kind in ("align", "both") else (),
        divergence=_DIVERGENCES[config.get("divergence")],
        scales=(config.get("scale_ext"), config.get("scale_ssh")),
        temperature=config.get("temperature"),
        queue=max(kept, 0),
        warmup=warmup,
        align_after=warmup + epoch if kind == "both" else 0,
    )


def replay(recording: Recording) -> Comparison:
    """Replay a recording: a step is a batch, an epoch ends with test images."""
    config, comparison = recording.config, Comparison(recording)
    method = _method(config)
    names = [name for name in recording.under("in") if name.startswith("source")]
    order = sorted(names, key=lambda name: int(name.removeprefix("source").split("/")[0]))
    source = [recording[f"in/{name}"] for name in order]
    adapted = adapt(build(recording), method, **({"source": source} if source else {}))
    test, steps = recording["in/test/x"], recording.steps()
    comparison.require(
        "config.epochs", config.get("epochs") * config.get("batches_per_epoch") == len(steps)
    )
    comparison.require("config.batch_size", _sizes(recording, steps, "view1", "batch_size"))
    comparison.require("config.align", _sizes(recording, steps, "align", "batch_size_align"))
    known = adapted.learner.constants
    for part, name in _PARTS.items():
        for recorded, own in (("cov", "cov"), ("coral", "coral"), ("mu", "mean"), ("mmd", "mmd")):
            if (path := f"extra/init/{recorded}_{name}") in recording:
                comparison.check(path, known.get(f"{own}_{part}"))
    comparison.check("extra/init/test_logits", adapted.predict(test))
    for step in steps:
        pair = [f"in/{step}/view{k}" for k in (1, 2)]
        views = [recording[path] for path in pair if path in recording]
        aligned = f"in/{step}/align"
        # The authors cut the views from other images than those that are aligned.
        adapted.learner.draw = lambda name, make, views=views: torch.stack(views)  # type: ignore[method-assign]
        adapted(recording[aligned] if aligned in recording else views[0])
        _compare(recording, comparison, step, adapted)
        if f"out/{step}/test_logits" in recording:
            comparison.check(f"out/{step}/test_logits", adapted.predict(test))
    return comparison


def _sizes(recording: Recording, steps: list[int], name: str, key: str) -> bool:
    size = recording.config.get(key)
    paths = [f"in/{step}/{name}" for step in steps]
    return all(len(recording[path]) == size for path in paths if path in recording)


def _compare(recording: Recording, comparison: Comparison, step: int, adapted: Adapted) -> None:
    state, notes = adapted.learner.state, adapted.notes
    parts = [notes[k][0] for k in ("contrast", "align_features", "align_head") if k in notes]
    comparison.check(f"out/{step}/losses", torch.stack(parts))
    values: dict[str, Any] = {**adapted.learner.module.state_dict(), **state.buffers}
    values |= state.weights
    for name in recording.under(f"state/{step}"):
        comparison.check(f"state/{step}/{name}", values.get(own_name(name)))
    for name in recording.under(f"extra/{step}"):
        comparison.check(f"extra/{step}/{name}", _extra(adapted, name))


def _extra(adapted: Adapted, name: str) -> Tensor | None:
    state = adapted.learner.state
    if name.startswith("queue_"):
        own = {recorded: part for part, recorded in _PARTS.items()}
        return state.memory.get(f"queue_{own[name.removeprefix('queue_')]}")
    parameter = name.removeprefix("opt/").removesuffix("/momentum_buffer")
    return state.slots["momentum_buffer"].get(own_name(parameter))


KINDS = {"adapt": replay}
