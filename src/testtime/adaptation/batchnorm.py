"""Whose statistics a BatchNorm layer normalises with. All of this works on subclasses too."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from testtime.adaptation import select

# (layer, mean of the batch, its unbiased variance, rows) -> mean and variance to normalise with
Statistics = Callable[[_BatchNorm, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def batch_norms(
    module: nn.Module, kinds: tuple[type[nn.Module], ...] = select.BATCH_NORMS
) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers that keep running statistics, by name."""
    found: dict[str, _BatchNorm] = {}
    for name, layer in module.named_modules():
        norm = isinstance(layer, _BatchNorm) and isinstance(layer, kinds)
        if norm and layer.running_mean is not None:
            found[name] = layer
    return found


def use_batch_statistics(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Make BatchNorm layers normalise with the batch's mean and biased variance in every mode."""
    for layer in batch_norms(module, kinds).values():
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = None


def moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return mean, unbiased variance and count of each channel of ``[B, C, ...]``.

    With one value a channel the variance is not a number.
    """
    others = [0, *range(2, x.dim())]
    count = x.numel() // x.shape[1]
    return x.mean(others), x.var(others, correction=1 if count > 1 else 0), count


def normalise_with(layer: _BatchNorm, statistics: Statistics, *, keep: bool) -> None:
    """Make a layer in eval mode normalise with what ``statistics`` returns for its own input.

    Args:
        layer: a BatchNorm layer with running statistics.
        statistics: called at each forward with the layer, the batch's moments and its rows.
        keep: the result stays as the running statistics; otherwise they are as before.
    """
    hooks = _Statistics(statistics, keep)
    layer.register_forward_pre_hook(hooks.put)
    layer.register_forward_hook(hooks.restore)


class _Statistics:
    """Puts statistics in for one forward of a layer, and its own back after it."""

    def __init__(self, statistics: Statistics, keep: bool) -> None:
        self._statistics, self._keep = statistics, keep
        self._held: list[tuple[Tensor | None, Tensor | None]] = []

    def put(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        x = args[0]
        mean, var, count = moments(x)
        if count == 1 and layer.running_var is not None:
            var = layer.running_var
        self._held.append((layer.running_mean, layer.running_var))
        layer.running_mean, layer.running_var = self._statistics(layer, mean, var, x.shape[0])

    def restore(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert isinstance(layer, _BatchNorm)
        mean, var = self._held.pop()
        if not self._keep:
            layer.running_mean, layer.running_var = mean, var


def move_statistics_first(layer: _BatchNorm, momentum: float) -> None:
    """Make a layer in train mode move its statistics, then normalise with them; RoTTA, section 3.2.

    With ``m`` the running mean or (biased) variance: ``m = (1 - momentum) * m + momentum * batch``;
    gradients go through the batch's part. In eval mode it normalises with what is there.
    """
    hooks = _MovedFirst(momentum)
    layer.register_forward_pre_hook(hooks.put)
    layer.register_forward_hook(hooks.restore)


class _MovedFirst:
    """Has a layer in train mode normalise as in eval mode, with statistics that have moved."""

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._training: list[bool] = []

    def put(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        assert isinstance(layer, _BatchNorm)
        self._training.append(layer.training)
        if not layer.training:
            return None
        assert layer.running_mean is not None
        assert layer.running_var is not None
        x = args[0].to(layer.running_mean.dtype)  # under autocast it may be in less
        others = [0, *range(2, x.dim())]
        shape = (-1, *[1] * (x.dim() - 2))
        mean = torch.lerp(layer.running_mean, x.mean(others), self._momentum)
        var = torch.lerp(layer.running_var, x.var(others, correction=0), self._momentum)
        layer.running_mean, layer.running_var = mean.detach(), var.detach()
        layer.training = False  # for this forward; the layer's own class may do more than normalise
        # No gradient goes through the statistics of the layer itself. The same value with theirs:
        ratio = ((var.detach() + layer.eps) / (var + layer.eps)).sqrt()
        moved = (x - mean.view(shape)) * ratio.view(shape) + mean.detach().view(shape)
        return (moved.to(args[0].dtype), *args[1:])

    def restore(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        layer.training = self._training.pop()
