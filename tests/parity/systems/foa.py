"""FOA, its shift alone, and its form by back-propagation."""

import torch
from torch import Tensor

import testtime as tt
from tests.parity.draws import Draws
from tests.parity.errors import Comparison
from tests.parity.networks import build
from tests.parity.optimizers import optimizer
from tests.parity.recording import Config, Recording, Unreplayable
from testtime.adaptation import evolution


def method(config: Config) -> tt.FOA:
    """Return FOA with the recorded hyper-parameters."""
    if (step := config.get("shift_step", 1.0)) != 1.0:
        raise Unreplayable(f"its shift_step is {step}, and the library's 1.0")
    variant = config.get("variant")
    fields = {"strength": config.get("fitness_lambda"), "rate": config.get("hist_ema")}
    config.get("seed_cma", None)  # the candidates themselves are recorded
    prompts, popsize, sigma = (config.get(k) for k in ("num_prompts", "popsize", "sigma0"))
    lr, momentum = (config.get(k) for k in ("lr", "momentum"))
    if variant == "foa":
        return tt.FOA(prompts=prompts, popsize=popsize, sigma=sigma, **fields)
    if variant == "bp":
        sgd = Config({"optimizer": "SGD", "lr": lr, "momentum": momentum})
        return tt.FOA("bp", optimizer=optimizer(sgd), **fields)
    return tt.FOA(variant, **fields)


def replay(recording: Recording) -> Comparison:
    """Replay batches with the recorded candidates; a reset there draws prompts anew."""
    config, comparison = recording.config, Comparison(recording)
    if recording.preset != "official":
        raise Unreplayable(f"its preset '{recording.preset}' is not known")
    foa = method(config)
    adapted = tt.adapt(build(recording), foa, source=[recording["in/source/x"]])
    learner = adapted.learner
    for name in ("mean", "std"):
        comparison.check(f"extra/init/train_{name}", learner.constants[name])
    names = list(learner.state.weights)
    comparison.require("config.params", config.get("params", names) == names)
    draws = Draws(
        recording,
        lambda name, inner, steps: name,
        lambda name, value: value.flatten() if name == "prompts" else value[: foa.popsize],
    )
    draws.follow(learner)
    if foa.variant == "foa":
        draws.places["prompts"] = "extra/init/prompts"  # drawn before the first step
        best = recording["extra/init/prompts"].flatten()
        _check_constants(comparison, recording)
    for step in recording.steps():
        draws.step = step
        if step in config.get("reset_before_steps"):
            adapted.reset()
            if foa.variant == "foa":
                best = recording[f"draw/{step}/reset_prompts"].flatten()
                learner.state.memory["best"].copy_(best)
        comparison.check(f"out/{step}/logits", adapted(recording[f"in/{step}/x"]))
        for name, value in _extras(adapted).items():
            comparison.check(name.format(step), value)
        if foa.variant == "foa":
            path = f"draw/{step}/candidates"
            comparison.check(path, torch.cat([recording[path][: foa.popsize], best[None]]))
            best = learner.state.memory["best"].clone()
        for name in recording.under(f"state/{step}"):
            comparison.check(f"state/{step}/{name}", learner.state.weights[name])
    return comparison


def _extras(adapted: tt.Adapted) -> dict[str, Tensor]:
    state, notes = adapted.learner.state, {k: v[0] for k, v in adapted.notes.items()}
    memory = state.memory
    found = {"extra/{}/hist_stat": memory["history"]}
    if "loss" in notes:
        found["out/{}/loss"] = notes["loss"]
    for slot, held in state.slots.items():
        found |= {f"extra/{{}}/opt/{name}/{slot}": tensor for name, tensor in held.items()}
    if "best" in memory:
        found |= {f"extra/{{}}/cma/{k}": memory[k] for k in ("mean", "sigma", "C", "pc", "ps")}
        found |= {f"extra/{{}}/{k}": notes[k] for k in ("fitness", "batch_means")}
        width = notes["batch_means"].shape[1]
        found["extra/{}/best_index"] = notes["best"]
        found["extra/{}/best_prompts"] = memory["best"].view(1, -1, width)
    return found


def _check_constants(comparison: Comparison, recording: Recording) -> None:
    size, config = recording["extra/init/prompts"].numel(), recording.config
    found = evolution.constants(size, config.get("popsize"))
    comparison.check("extra/init/cma_weights", torch.tensor(found.weights))
    for name, value in config.get("cma", {}).items():
        own = {"N": size, "popsize": config.get("popsize")}.get(name)
        own = getattr(found, name) if own is None else own
        comparison.require(f"config.cma.{name}", abs(own - value) <= 1e-12 * abs(value))


KINDS = {"adapt": replay}
