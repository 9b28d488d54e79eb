"""Modules whose parameters are recorded by official names: build, call, compare."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.errors import Comparison
from tests.parity.recording import Recording, Unreplayable
from testtime.layers import from_official, to_official


def load(module: nn.Module, recording: Recording) -> nn.Module:
    """Return the module in the recording's dtype with its recorded parameters, all of them trained.

    The authors' code computes the gradients of frozen parameters too.
    """
    module = module.to(recording.dtype).requires_grad_()
    tensors = {name: recording[f"init/{name}"] for name in recording.under("init")}
    try:
        from_official(module, tensors)
    except (ValueError, RuntimeError) as error:
        raise Unreplayable(f"its parameters do not fit ({error})") from error
    return module.eval()


def build(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Return a module, or refuse a description that the library refuses."""
    try:
        return make(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise Unreplayable(f"its network cannot be built ({error})") from error


def check_gradients(
    comparison: Comparison, recording: Recording, grads: dict[str, Tensor | None]
) -> None:
    """Hold gradients by recorded names against the recorded ones; a missing one is none."""
    for name in recording.under("grad"):
        comparison.check(f"grad/{name}", grads.get(name))


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the gradients of the parameters by official name; one without counts as zero."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
    }
    return {**to_official(module, found)}


def expect(recording: Recording, **values: Any) -> None:
    """Refuse a recording whose config says anything else, where it says it."""
    for key, value in values.items():
        if (found := recording.config.get(key, value)) != value:
            raise Unreplayable(f"its {key} is {found!r}, and the library's {value!r}")
