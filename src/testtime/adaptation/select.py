"""Which tensors of a module may change: functions from a module to names."""

import re

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

BATCH_NORMS: tuple[type[nn.Module], ...] = (_BatchNorm,)
NORMS: tuple[type[nn.Module], ...] = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


def layers(module: nn.Module, kinds: tuple[type[nn.Module], ...] = NORMS) -> list[str]:
    """Return the dotted names of all layers of the given kinds, subclasses included."""
    return [name for name, child in module.named_modules() if isinstance(child, kinds)]


def norm_affine(module: nn.Module, kinds: tuple[type[nn.Module], ...] = NORMS) -> list[str]:
    """Return the names of the scales and shifts of all normalisation layers.

    Args:
        module: any network.
        kinds: classes of layers to look for, subclasses included.

    Returns:
        Names in module order, weight before bias; tied tensors once.
    """
    wanted = {
        f"{name}.{part}".lstrip(".")
        for name in layers(module, kinds)
        for part in ("weight", "bias")
    }
    return [name for name, _ in module.named_parameters() if name in wanted]


def norm_statistics(module: nn.Module, kinds: tuple[type[nn.Module], ...] = NORMS) -> list[str]:
    """Return the names of the running statistics of all normalisation layers."""
    found = tuple(f"{name}." if name else "" for name in layers(module, kinds))
    parts = ("running_mean", "running_var", "num_batches_tracked")
    wanted = {prefix + part for prefix in found for part in parts}
    return [name for name, _ in module.named_buffers() if name in wanted]


def everything(module: nn.Module) -> list[str]:
    """Return the names of all parameters."""
    return [name for name, _ in module.named_parameters()]


def matching(module: nn.Module, pattern: str) -> list[str]:
    """Return the names of the parameters in which the regular expression is found."""
    return [name for name, _ in module.named_parameters() if re.search(pattern, name)]
