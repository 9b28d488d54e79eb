"""What is looked at before a batch changes anything: inputs, and what a method returns."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from testtime.adaptation.calls import Call, describe
from testtime.adaptation.core import Method, Objective, Settled
from testtime.adaptation.optim import Tensors
from testtime.adaptation.preprocessing import Preprocessing, mismatch

Found = TypeVar("Found", Objective, Settled)

# No normalisation of [0, 1] images in use gives values this large; images of 0 to 255 do.
LARGEST_IMAGE_VALUE = 30.0


def check_call(call: Call, model: nn.Module, smallest: int, method: str) -> None:
    """Refuse an input that no model of this dtype and device can take, or that has no rows.

    Raises:
        TypeError, ValueError: what was wrong, what was found, what to do.
    """
    x = call.x
    if "labels" in call.kwargs:
        raise ValueError(
            "The call has labels=, but labels must never reach a method that adapts. "
            "Leave them out and compute your metrics from the answer."
        )
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(
            f"The batch is empty: the input is {describe(x)}. Pass at least one row, [B, ...]."
        )
    if x.shape[0] < smallest:
        raise ValueError(
            f"{method} needs batches of at least {smallest}, but this one has {x.shape[0]}. "
            "Use larger batches, or a method that works on single samples."
        )
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return
    if x.device != parameter.device:
        raise ValueError(
            f"The input is on {x.device}, the model on {parameter.device}. "
            f"Move one of them, such as x.to('{parameter.device}')."
        )
    if x.dtype == torch.bool or (x.dtype == torch.uint8) or (_integral(x) and x.dim() > 2):
        raise TypeError(
            f"The input is {describe(x)}, but the model works in {_name(parameter.dtype)}. "
            "Convert images to floats in [0, 1] (x / 255) and normalise as the model expects."
        )
    free = torch.is_autocast_enabled(x.device.type)
    if x.is_floating_point() and x.dtype != parameter.dtype and not free:
        raise TypeError(
            f"The input is {describe(x)}, but the model works in {_name(parameter.dtype)}. "
            f"Convert it: x.to({parameter.dtype})."
        )


def check_values(x: Tensor, given: Preprocessing | None, own: Preprocessing | None) -> str:
    """Refuse values that are not finite or are images of 0 to 255; return a suspicion, or nothing.

    Args:
        x: the input of the first batch after building or a reset.
        given: the preprocessing that the user named.
        own: the preprocessing that the model carries.
    """
    if not x.is_floating_point():
        return ""
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).flatten(1).any(1).sum()) if x.dim() > 1 else 1
        raise ValueError(
            f"{bad} of {x.shape[0]} rows of the first batch hold NaN or infinite values. Clean the "
            "input; on later batches such values are counted and change nothing."
        )
    is_image = x.dim() == 4 and x.shape[1] in (1, 3)
    if is_image and given is None and float(x.abs().max()) > LARGEST_IMAGE_VALUE:
        raise ValueError(
            f"The images span [{float(x.min()):g}, {float(x.max()):g}], which looks like 0 to 255. "
            "Divide by 255 and normalise as the model expects; if it does take such values, pass "
            "mean=0 and std=1/255 to adapt()."
        )
    wanted = given or own
    return mismatch(x, wanted) if wanted and is_image else ""


def named(found: Found, method: Method) -> Found:
    """Return what a method's function returned, if it is what it must be."""
    if isinstance(found, Objective | Settled):
        return found
    raise TypeError(
        f"{type(method).__name__} returned {type(found).__name__}; loss returns "
        "Objective(loss=..., logits=...), settle Settled(values=..., memory=...)."
    )


def check_objective(objective: Objective, method: Method, many: int) -> None:
    """Refuse what a loss may not return.

    Args:
        objective: what it returned.
        method: whose loss it is.
        many: the number of samples with weights of their own, whose scalars are stacked; else 0.
    """
    for what in ("loss", "when"):
        value = getattr(objective, what)
        if value is not None and value.dim() != bool(many):
            raise ValueError(
                f"The '{what}' of {type(method).__name__} has shape {list(value.shape)}; it must "
                "be one value for the whole batch. Take its mean or sum; to leave rows out, mask "
                "them in it."
            )


def check_places(values: Tensors, held: Tensors, method: Method, many: int) -> None:
    """Refuse names and shapes that the state has no place for."""
    for name, value in values.items():
        if name not in held:
            raise ValueError(
                f"{type(method).__name__} writes '{name}', for which there is no place (there is "
                f"{some(list(held)) or 'none'}). Declare weights in select, memory in begin."
            )
        if not many and value.shape != held[name].shape:
            raise ValueError(
                f"{type(method).__name__} writes '{name}' in shape {list(value.shape)}, but it has "
                f"{list(held[name].shape)}. Shapes are fixed from the start."
            )


def some(names: list[str], most: int = 4) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _integral(x: Tensor) -> bool:
    return not x.is_floating_point() and not x.is_complex()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
