"""Models by name: a specification on the command line becomes a trained module."""

import importlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from testtime._suggest import suggest
from testtime.models.hubs import huggingface_model, timm_model, torchvision_model
from testtime.models.resnet import CifarResNet, Normalize, ResNetGN

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# The networks of the published CIFAR-10 checkpoints, and the normalisation they were trained with.
CHECKPOINTS: dict[str, tuple[Callable[[], nn.Module], tuple[Sequence[float], Sequence[float]]]] = {
    "resnet20": (lambda: CifarResNet(20), _IMAGENET),
    "resnet56": (lambda: CifarResNet(56), _IMAGENET),
    "resnet26gn": (lambda: ResNetGN(26), _HALF),
}


HUBS: dict[str, Callable[..., nn.Module]] = {
    "timm": timm_model,
    "torchvision": torchvision_model,
    "hf": huggingface_model,
}


def load_checkpoint(name: str, path: str | Path) -> nn.Module:
    """Return a published CIFAR-10 network in eval mode; it takes images in [0, 1].

    Args:
        name: a key of ``CHECKPOINTS``; its normalisation becomes part of the module.
        path: a safetensors file with the network's weights.

    Raises:
        ValueError: the name is not known, or the file does not hold this network.
        FileNotFoundError: there is no such file.
    """
    if name not in CHECKPOINTS:
        raise ValueError(
            f"There is no network '{name}' (known: {', '.join(CHECKPOINTS)})."
            f"{suggest(name, CHECKPOINTS)}"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}. Give a safetensors file with weights.")
    build, (mean, std) = CHECKPOINTS[name]
    network = build()
    try:
        network.load_state_dict(load_file(str(path)))
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{path} does not hold the weights of {name}: {reason} Give the file of that network."
        ) from error
    parts = OrderedDict(normalize=Normalize(mean, std), model=network)
    return nn.Sequential(parts).eval()


def call_factory(spec: str) -> Any:
    """Return what ``package.module:factory`` returns when called without arguments.

    Raises:
        ValueError: the module or the function is not there.
    """
    place, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:  # a console script does not look into the present folder
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"'{spec}' cannot be called: {error}. Give package.module:function, importable from "
            "the present folder, of a function without arguments that returns a model."
        ) from error
    return factory()


def short_name(spec: str) -> str:
    """Return what results call a model: a published network without its file, else all of it."""
    kind = spec.partition(":")[0]
    return kind if kind in CHECKPOINTS else spec


def load_model(spec: str) -> nn.Module:
    """Return a model in eval mode by its specification; see :func:`load_with_inputs`."""
    return load_with_inputs(spec)[0]


def load_with_inputs(spec: str) -> tuple[nn.Module, Any]:
    """Return a model in eval mode by its specification, and the inputs that came with it, if any.

    Args:
        spec: ``resnet20:FILE``, ``resnet56:FILE`` or ``resnet26gn:FILE`` (published CIFAR-10
            networks, from images in [0, 1]); ``timm:NAME[:FILE]``, ``torchvision:NAME[:FILE]``,
            ``hf:NAME_OR_FOLDER`` (their own normalisation in front, so from images in [0, 1] too);
            or ``package.module:factory``; a factory takes no arguments and returns a model, or a
            model and inputs.

    Raises:
        ValueError, FileNotFoundError: what was wrong, and what would do.
    """
    kind, colon, rest = spec.partition(":")
    if not colon:
        raise ValueError(
            f"The model '{spec}' has no ':'. Write NETWORK:FILE with one of "
            f"{', '.join(CHECKPOINTS)}, {', '.join(f'{hub}:NAME' for hub in HUBS)}, or "
            "package.module:factory."
        )
    if kind in HUBS:
        return HUBS[kind](*rest.split(":")), None
    mistyped = "." not in kind and suggest(kind, CHECKPOINTS)
    if kind in CHECKPOINTS or mistyped:
        return load_checkpoint(kind, rest), None
    made = call_factory(spec)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"'{spec}' returned {type(model).__name__}, not a torch.nn.Module. Return the "
            "model, or the model and inputs for it."
        )
    return model.eval(), inputs
