"""Scanned digits and two small trained networks, inside the package: nothing is fetched.

DIGITS.md, beside this file, states origin, licence and accuracies. To train the networks again:
``python -m testtime.demo.train``.
"""

import hashlib
from collections.abc import Callable
from importlib.resources import files
from typing import Literal

import torch.nn.functional as F
from safetensors.torch import load as read_safetensors
from torch import Tensor, nn

from testtime._suggest import suggest
from testtime.models import CifarResNet, ResNetGN

__all__ = ["CORRUPTIONS", "MODELS", "SPLIT", "digits", "load", "sha256"]

# The file holds the images in this order, so that the split cannot change under a stored result.
SPLIT = "digits-1797: 1000 train / 797 test, seed 0"

# What the demonstration shows, all at severity 5.
CORRUPTIONS = ("gaussian_noise", "defocus_blur", "fog", "contrast")

# The networks of the shipped weights, untrained; the weights are in NAME.safetensors.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet_bn": lambda: CifarResNet(depth=8, width=8),
    "resnet_gn": lambda: ResNetGN(depth=8, width=8, groups=4),
}


def digits(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Give the scanned digits as images for a network, and their labels.

    >>> images, labels = digits("test")
    >>> images.shape, labels.shape
    (torch.Size([797, 3, 32, 32]), torch.Size([797]))

    The scans of 8 x 8 pixels and 17 grey levels are enlarged bilinearly to 32 x 32 and repeated in
    three channels.

    Args:
        split: "train" (1,000 images) or "test" (797), as ``SPLIT`` names it.

    Returns:
        Images [B, 3, 32, 32], float32 in [0, 1], and labels [B], int64, 0 to 9.

    Raises:
        ValueError: there is no such split.

    Source: E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", UCI Machine
    Learning Repository, 1998, the part that scikit-learn ships; CC BY 4.0.
    """
    if split not in ("train", "test"):
        raise ValueError(f'The digits are split in "train" and "test", found {split!r}.')
    tensors = _read("digits")
    part = slice(0, 1000) if split == "train" else slice(1000, None)
    scans = tensors["images"][part].unsqueeze(1).float() / 16
    images = F.interpolate(scans, size=(32, 32), mode="bilinear", align_corners=False)
    return images.repeat(1, 3, 1, 1), tensors["labels"][part].long()


def load(model: str = "resnet_bn") -> tuple[nn.Module, Tensor, Tensor]:
    """Give a trained network with the test digits that it has not seen.

    >>> model, images, labels = load("resnet_bn")
    >>> (model(images).argmax(1) == labels).float().mean() > 0.97
    tensor(True)

    Args:
        model: "resnet_bn" (BatchNorm) or "resnet_gn" (GroupNorm). Both take images in [0, 1].

    Returns:
        The network in eval mode, the 797 clean test images and their labels, as from ``digits``.

    Raises:
        ValueError: there is no such model.
    """
    if model not in MODELS:
        raise ValueError(
            f"There is no demo model '{model}' (known: {', '.join(MODELS)})."
            f"{suggest(model, MODELS)}"
        )
    network = MODELS[model]()
    network.load_state_dict(_read(model))
    return network.eval(), *digits("test")


def sha256() -> str:
    """Give the hash of the file of digits, which names the data in results."""
    return hashlib.sha256(_bytes("digits")).hexdigest()


def _read(name: str) -> dict[str, Tensor]:
    return read_safetensors(_bytes(name))


def _bytes(name: str) -> bytes:
    return files(__name__).joinpath(f"{name}.safetensors").read_bytes()
