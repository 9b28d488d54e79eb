"""Small ResNets for 32-pixel images: with BatchNorm, and with GroupNorm.

The shortcuts have no parameters and the modules are named as in the checkpoints that the field
shares, so that those load with ``strict=True``.
"""

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn, tensor


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, channel by channel.

    Put before a network, it lets the whole take images in [0, 1]::

        nn.Sequential(OrderedDict(normalize=Normalize(mean, std), model=network))

    Both are constants, not state: they are absent from the ``state_dict``.

    Args:
        mean: one value a channel, in the units of the images.
        std: one positive value a channel.

    Raises:
        ValueError: the two differ in length, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(
                "Normalize needs one mean and one positive standard deviation a channel, "
                f"found mean={tuple(mean)} and std={tuple(std)}; give two sequences of one length."
            )
        self.register_buffer("mean", tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images [B, C, H, W]."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Show both constants when the module is printed."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class CifarResNet(nn.Module):
    """BatchNorm ResNet for CIFAR: images [B, 3, H, W] to logits [B, num_classes].

    Three stages of (depth - 2) / 6 basic blocks with width, 2 width and 4 width channels; where the
    shape changes the shortcut takes every second pixel and pads the channels with zeros on both
    sides (option A). The last pooling is global, so H and W may be any multiple of 4.

    Args:
        depth: number of weighted layers, 6n + 2: 8, 20, 32, 44, 56 or 110.
        num_classes: number of logits.
        width: channels of the first stage, an even number.

    Raises:
        ValueError: no network has that depth or width.

    Source: He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016, 4.2.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        n = _blocks_per_stage(depth)
        if width < 2 or width % 2:
            raise ValueError(
                f"The zero padding of the shortcut splits the channels in two halves, found "
                f"width={width}; choose an even width."
            )
        self.conv1 = _conv3x3(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(_BatchNormBlock(c, width) for c in [width] * n))
        self.layer2 = nn.Sequential(
            *(_BatchNormBlock(c, 2 * width) for c in [width] + [2 * width] * (n - 1))
        )
        self.layer3 = nn.Sequential(
            *(_BatchNormBlock(c, 4 * width) for c in [2 * width] + [4 * width] * (n - 1))
        )
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class ResNetGN(nn.Module):
    """Pre-activation GroupNorm ResNet: images [B, 3, H, W] to logits [B, num_classes].

    Three stages of (depth - 2) / 6 blocks with width, 2 width and 4 width channels; where the shape
    changes the shortcut averages 2 x 2 pixels and appends zero channels. No layer looks across the
    batch. The last pooling is global, so H and W may be any multiple of 4.

    Args:
        depth: number of weighted layers, 6n + 2.
        num_classes: number of logits.
        width: channels of the first stage, a multiple of groups.
        groups: groups of every GroupNorm; 0: BatchNorm in its place.

    Raises:
        ValueError: no network has that depth, or width is not a multiple of groups.

    Source: Sun et al., "Test-time training with self-supervision for generalization under
    distribution shifts", ICML 2020; Zhang, Levine and Finn, "MEMO", NeurIPS 2022.
    """

    def __init__(
        self, depth: int = 26, num_classes: int = 10, width: int = 16, groups: int = 8
    ) -> None:
        super().__init__()
        n = _blocks_per_stage(depth)
        if groups and (groups < 0 or width < groups or width % groups):
            raise ValueError(
                f"GroupNorm cannot split {width} channels into {groups} groups; "
                "choose a width that is a multiple of groups."
            )
        self.conv1 = _conv3x3(3, width)
        self.layer1 = nn.Sequential(*(_GroupNormBlock(c, width, groups) for c in [width] * n))
        self.layer2 = nn.Sequential(
            *(_GroupNormBlock(c, 2 * width, groups) for c in [width] + [2 * width] * (n - 1))
        )
        self.layer3 = nn.Sequential(
            *(_GroupNormBlock(c, 4 * width, groups) for c in [2 * width] + [4 * width] * (n - 1))
        )
        self.bn = _norm(groups, 4 * width)
        self.fc = nn.Linear(4 * width, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = F.relu(self.bn(x))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def rotation_head(network: ResNetGN, branch: str = "layer3") -> nn.Module:
    """Return the second head of the paper above: from what goes into ``branch`` to 4 rotations.

    A copy of the network's layers from there on, with a classifier of its own. For
    ``testtime.TwoHeads(network, rotation_head(network), branch="layer3")``, trained jointly.

    Args:
        network: gives the layers, and their weights to start from.
        branch: ``layer3``, or ``fc``: the head is one linear layer on the pooled features.

    Raises:
        ValueError: there is no head from that branch on.
    """
    if branch not in ("layer3", "fc"):
        raise ValueError(f"The second head reads what goes into layer3 or fc, found '{branch}'.")
    linear = nn.Linear(network.fc.in_features, 4)
    if branch == "fc":
        return linear
    layers = copy.deepcopy((network.layer3, network.bn))
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


class _BatchNormBlock(nn.Module):
    """Basic block, activation after the sum; halves the image when it has more channels out."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.widens = channels != channels_in
        self.conv1 = _conv3x3(channels_in, channels, stride=2 if self.widens else 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.widens:
            half = x.shape[1] // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        return F.relu(x + y)


class _GroupNormBlock(nn.Module):
    """Basic block, norm and activation first; halves the image when it has more channels out."""

    def __init__(self, channels_in: int, channels: int, groups: int) -> None:
        super().__init__()
        self.widens = channels != channels_in
        # The checkpoints call the GroupNorms bn1 and bn2.
        self.bn1 = _norm(groups, channels_in)
        self.conv1 = _conv3x3(channels_in, channels, stride=2 if self.widens else 1)
        self.bn2 = _norm(groups, channels)
        self.conv2 = _conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        if self.widens:
            x = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, x.shape[1]))
        return x + y


def _norm(groups: int, channels: int) -> nn.Module:
    return nn.GroupNorm(groups, channels) if groups else nn.BatchNorm2d(channels)


def _conv3x3(channels_in: int, channels: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


def _blocks_per_stage(depth: int) -> int:
    if depth < 8 or depth % 6 != 2:
        raise ValueError(
            f"A network of three stages has 6n + 2 layers, found depth={depth}; "
            "choose 8, 14, 20, 26, 32, ..."
        )
    return (depth - 2) // 6
