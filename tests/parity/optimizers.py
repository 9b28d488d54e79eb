"""The optimiser that a recording's hyper-parameters describe."""

import torch
from torch import Tensor, nn

from tests.parity.recording import Config, Unreplayable
from testtime.adaptation.optim import SGD, Adam, AdamW
from testtime.adaptation.state import State


def optimizer(config: Config, around: str = "") -> SGD | Adam:
    """Return the optimiser; what is not in the config has PyTorch's default.

    Args:
        config: names it as ``optimizer``.
        around: what that name begins with where the method wraps it.
    """
    spelled = config.get("optimizer").removeprefix(around)
    name = spelled.lower()
    lr, decay = config.get("lr"), config.get("weight_decay", 0.0)
    # Some recordings name what the optimiser does not have, as null.
    betas, momentum = config.get("betas", None), config.get("momentum", None)
    nesterov = config.get("nesterov", False)
    if name in ("adam", "adamw"):
        kind = {"adam": Adam, "adamw": AdamW}[name]
        return kind(lr, tuple(betas or (0.9, 0.999)), config.get("eps", 1e-8), decay)
    if name != "sgd":
        raise Unreplayable(f"its optimiser {spelled!r} is not known")
    if dampening := config.get("dampening", 0.0):
        raise Unreplayable(f"its SGD has a dampening of {dampening}, which the library lacks")
    return SGD(lr, momentum or 0.0, nesterov, decay)


def slots(state: State, form: str = "optim.{}.{}") -> dict[str, Tensor]:
    """Return the optimiser's state as recordings name it: by parameter and slot."""
    found = {
        form.format(name, slot): tensor
        for slot, held in state.slots.items()
        for name, tensor in held.items()
        if slot != "step"
    }
    # PyTorch counts for each tensor what the library counts once for all.
    counts = state.slots.get("step", {}).values()
    return found | {form.format(name, "step"): count for count in counts for name in state.weights}


def momenta(state: State) -> dict[str, Tensor]:
    """Return the optimiser's momentum as some recordings name it: ``opt/<parameter>/<slot>``."""
    held = state.slots.get("momentum_buffer", {})
    return {f"opt/{name}/momentum_buffer": momentum for name, momentum in held.items()}


def torch_momenta(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the momentum of PyTorch's own SGD, by the same names."""
    held = ((name, optimizer.state[p]) for name, p in model.named_parameters())
    return {
        f"opt/{name}/momentum_buffer": state["momentum_buffer"]
        for name, state in held
        if state.get("momentum_buffer") is not None
    }
