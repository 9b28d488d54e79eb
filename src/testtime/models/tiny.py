"""One tiny network of each kind, and batches for it: to try a method on, in milliseconds."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLASSES = 5
ROWS = 6


def convolutional(norm: Callable[[int], nn.Module], dims: int = 2, channels: int = 8) -> nn.Module:
    """Return two convolutions with a norm layer each, pooling and a classifier.

    Args:
        norm: from a number of channels to a layer.
        dims: spatial dimensions of the input, 2 or 3.
        channels: of both convolutions.
    """
    conv: type[nn.Module] = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    pool = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims](1)
    return nn.Sequential(
        *(conv(3, channels, 3, padding=1), norm(channels), nn.ReLU()),
        *(conv(channels, channels, 3, padding=1), norm(channels), nn.ReLU()),
        *(pool, nn.Flatten(), nn.Linear(channels, CLASSES)),
    )


class Transformer(nn.Module):
    """Patches, one encoder block with LayerNorm, the mean over tokens, a classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, 5]`` of images ``[B, 3, H, W]``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.block(tokens)).mean(1))
        return logits


def perceptron() -> nn.Module:
    """Return two linear layers with BatchNorm1d between, for rows of 10 features."""
    return nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


IMAGES, VOLUMES, FEATURES = (3, 8, 8), (3, 4, 4, 4), (10,)

# Each kind: a network, and the shape of one input.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batchnorm1d": (perceptron, FEATURES),
    "batchnorm2d": (lambda: convolutional(nn.BatchNorm2d), IMAGES),
    "batchnorm3d": (lambda: convolutional(nn.BatchNorm3d, dims=3), VOLUMES),
    "groupnorm": (lambda: convolutional(lambda channels: nn.GroupNorm(2, channels)), IMAGES),
    "layernorm": (lambda: convolutional(lambda channels: nn.LayerNorm([channels, 8, 8])), IMAGES),
    "instancenorm": (
        lambda: convolutional(lambda channels: nn.InstanceNorm2d(channels, affine=True)),
        IMAGES,
    ),
    "none": (lambda: convolutional(lambda channels: nn.Identity()), IMAGES),
    "transformer": (Transformer, IMAGES),
}


def tiny(kind: str, batches: int = 3, seed: int = 0) -> tuple[nn.Module, list[Tensor]]:
    """Return a network in eval mode and batches of 6 inputs in [0, 1], the same every time.

    Scales, shifts and running statistics are random, so that nothing is right by being trivial.

    Args:
        kind: a key of ``KINDS``.
        batches: how many.
        seed: of weights and inputs; the global generator is left alone.
    """
    build, shape = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomised(build()).eval(), [torch.rand(ROWS, *shape) for _ in range(batches)]


def randomised(model: nn.Module) -> nn.Module:
    """Return the model with random scales, shifts and running statistics, written in place."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            part = name.rpartition(".")[2]
            if part == "running_mean" or (part == "bias" and tensor.dim() == 1):
                tensor.normal_(0, 0.3)
            elif part == "running_var" or (part == "weight" and tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5)
    return model
