"""Classifiers of other libraries by name, with their own normalisation in front."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from testtime.models.resnet import Normalize

EXTRA = "needs {}: pip install 'testtime[models]'."


class Sized(nn.Module):
    """Refuses images of another size than a model was trained on."""

    def __init__(self, side: int, name: str) -> None:
        super().__init__()
        self.side, self.name = side, name

    def forward(self, x: Tensor) -> Tensor:
        """Return the images, which have the size wanted."""
        if max(x.shape[-2:]) != self.side:
            raise ValueError(
                f"{self.name} was trained on images of {self.side} pixels, but these have "
                f"{x.shape[-2]} x {x.shape[-1]}. Resize them when they are read, such as "
                f"resize={self.side}:crop={self.side}."
            )
        return x


class Logits(nn.Module):
    """The logits alone of a model that returns more."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, C]``."""
        logits: Tensor = self.network(x).logits
        return logits


def timm_model(name: str, path: str = "") -> nn.Module:
    """Return a model of timm that takes images in [0, 1], normalised as its configuration says.

    Args:
        name: as ``timm.create_model`` takes it.
        path: of weights (safetensors); none: the pretrained ones, which timm fetches.

    Raises:
        ImportError, ValueError, FileNotFoundError: what is missing.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"timm:{name} {EXTRA.format(error.name)}") from error
    try:
        network = timm.create_model(name, pretrained=not path)
    except RuntimeError as error:
        raise ValueError(
            f"timm has no model '{name}' ({error}). timm.list_models() does."
        ) from error
    config: Any = network.pretrained_cfg
    _fill(network, path, name)
    return _in_front(network, config["mean"], config["std"], config["input_size"][-1], name)


def torchvision_model(name: str, path: str = "") -> nn.Module:
    """Return a model of torchvision that takes images in [0, 1].

    Args:
        name: as ``torchvision.models.get_model`` takes it.
        path: of weights (safetensors); none: the default ones, which torchvision fetches.

    Raises:
        ImportError, ValueError, FileNotFoundError: what is missing.
    """
    try:
        import torchvision  # type: ignore[import-untyped]
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"torchvision:{name} needs a torchvision that fits this torch ({error}): "
            "pip install torchvision from the same index as torch."
        ) from error
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
    except ValueError as error:
        raise ValueError(f"torchvision has no model '{name}' ({error}).") from error
    network = torchvision.models.get_model(name, weights=None if path else weights)
    _fill(network, path, name)
    made = weights.transforms()
    return _in_front(network, made.mean, made.std, made.crop_size[0], name)


def huggingface_model(name: str) -> nn.Module:
    """Return an image classifier of Hugging Face that takes images in [0, 1].

    Args:
        name: a name on the hub or a folder, with the configuration of its image processor.

    Raises:
        ImportError, ValueError: what is missing.
    """
    try:
        from transformers import AutoImageProcessor, AutoModelForImageClassification
    except ImportError as error:
        raise ImportError(f"hf:{name} {EXTRA.format(error.name)}") from error
    try:
        network = AutoModelForImageClassification.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{name}' is no image classifier with an image processor ({error}). Name a folder or "
            "a model of the hub that has both."
        ) from error
    crop = getattr(processor, "crop_size", None) or processor.size
    side = int(dict(crop).get("height") or dict(crop).get("shortest_edge") or 0)
    return _in_front(Logits(network), processor.image_mean, processor.image_std, side, name)


def _in_front(
    network: nn.Module, mean: Sequence[float], std: Sequence[float], side: int, name: str
) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if side:
        parts["sized"] = Sized(side, name)
    parts["normalize"] = Normalize(tuple(mean), tuple(std))
    parts["model"] = network
    return nn.Sequential(parts).eval()


def _fill(network: nn.Module, path: str, name: str) -> None:
    if not path:
        return
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}. Give a safetensors file with weights.")
    try:
        weights: Mapping[str, Any] = load_file(path)
        network.load_state_dict({k: _widened(v) for k, v in weights.items()})
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{path} does not hold the weights of {name}: {reason}") from error


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor
