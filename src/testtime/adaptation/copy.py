"""The private copy: a module of its own that shares every parameter's storage with the user's."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside a ``torch.compile`` wrapper, or the model itself.

    Raises:
        TypeError: the model is no module, or there is a kind of module in it that cannot adapt.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"The model must be a torch.nn.Module, but {type(model).__name__} was given. "
            "Wrap your function in a module, or pass the module itself."
        )
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return unwrap(inner)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "The model is a ScriptModule, whose forward cannot run under other weights. "
            "Pass the Python module that it was scripted from."
        )
    for name, part in model.named_modules():
        if isinstance(part, _WRAPPERS):
            raise TypeError(
                f"{f'{name!r} in the' if name else 'The'} model is wrapped in "
                f"{type(part).__name__}, whose replicas do not see what adapts. Pass the module "
                "inside it (`model.module`), one adapted model a process."
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise TypeError(
                f"The parameter '{name}' has no shape yet (a lazy module). "
                "Call the model once on an input before adapting it."
            )
    return model


def private_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy whose parameters are new, frozen, and over the same storage.

    Every parameter of the copy is a ``Parameter`` object of its own (so flags, ``.grad`` and dtype
    casts do not reach the user's model) that shares memory with the original. Buffers are cloned.
    Inference tensors cannot be shared, for they take no part in autograd: they are cloned too.

    Args:
        model: any module that ``copy.deepcopy`` can copy.

    Raises:
        TypeError: something in the model cannot be copied; the message names it.
    """
    memo: dict[int, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for parameter in model.parameters():
            shared = parameter.detach()
            twin = nn.Parameter(shared.clone() if shared.is_inference() else shared, False)
            twin.__dict__.update(parameter.__dict__)
            memo[id(parameter)] = twin
        for buffer in model.buffers():
            memo[id(buffer)] = buffer.detach().clone()
        try:
            return copy.deepcopy(model, memo)
        except Exception as error:
            raise TypeError(
                f"The model cannot be copied: {error}{_culprit(model)} "
                "Keep such values in buffers, or make them anew in forward()."
            ) from error


def shared_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters whose storage a private copy shares, by name."""
    return {k: p for k, p in model.named_parameters() if not p.is_inference()}


class Watch:
    """Notices a later change in place of tensors whose storage is shared.

    A copy of it (deep, or pickled) watches nothing, for what is copied with it shares nothing.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._seen = [(name, tensor, tensor._version) for name, tensor in tensors.items()]

    def changed(self) -> str | None:
        """Return the name of the first tensor that has been changed, if one has."""
        return next((name for name, t, version in self._seen if t._version != version), None)

    def __reduce__(self) -> tuple[type["Watch"], tuple[dict[str, Tensor]]]:
        return (Watch, ({},))


def _culprit(model: nn.Module) -> str:
    def computed() -> Iterator[str]:
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    yield f"{name}.{key}".lstrip(".")

    names = list(computed())
    return f" (computed tensors kept as attributes: {', '.join(names)})." if names else "."
