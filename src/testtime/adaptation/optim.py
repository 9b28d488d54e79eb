"""Optimisers as pure update rules: tensors in, new tensors out, nothing kept."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Slots = dict[str, Tensors]
Listed = list[Tensor] | tuple[Tensor, ...]


def _like(value: Tensor, target: Tensor) -> Tensor:
    """Append dimensions, so that a scalar or a value a sample broadcasts against ``target``."""
    return value.reshape(value.shape + (1,) * (target.dim() - value.dim()))


def gate(when: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """Return ``new`` where ``when`` holds and ``old`` elsewhere, without a look from the host.

    Args:
        when: boolean, a scalar or ``[n]`` for n samples with tensors of their own; none: always.
        new: any tensor.
        old: like ``new``.
    """
    return new if when is None else torch.where(_like(when, new), new, old)


def _put(held: Tensors, new: Listed, names: list[str], when: Tensor | None) -> Tensors:
    return held | {k: gate(when, value, held[k]) for k, value in zip(names, new, strict=True)}


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, equal to ``torch.optim.SGD`` to the bit.

    Args:
        lr: learning rate.
        momentum: share of the last update that is kept; the first one is the gradient.
        nesterov: look ahead along the momentum.
        weight_decay: L2 term, added to the gradient.
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def slots(self, weights: Tensors) -> Slots:
        """Return the state before the first update, zeros."""
        if not self.momentum:
            return {}
        return {"momentum_buffer": {k: torch.zeros_like(w) for k, w in weights.items()}}

    def update(
        self, weights: Tensors, grads: Tensors, slots: Slots, when: Tensor | None = None
    ) -> tuple[Tensors, Slots]:
        """Return new weights and slots; a tensor without gradient stays as it is."""
        names = list(grads)
        step: Listed = list(grads.values())
        values = [weights[k] for k in names]
        if self.weight_decay:
            step = torch._foreach_add(step, values, alpha=self.weight_decay)
        if self.momentum:
            held = slots["momentum_buffer"]
            moved = torch._foreach_mul([held[k] for k in names], self.momentum)
            torch._foreach_add_(moved, step)
            ahead = torch._foreach_add(step, moved, alpha=self.momentum) if self.nesterov else moved
            slots, step = {"momentum_buffer": _put(held, moved, names, when)}, ahead
        return _put(weights, torch._foreach_add(values, step, alpha=-self.lr), names, when), slots


@dataclass(frozen=True)
class Adam:
    """Adam, equal to ``torch.optim.Adam`` to rounding.

    Args:
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: L2 term, added to the gradient.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    _coupled: ClassVar[bool] = True

    def slots(self, weights: Tensors) -> Slots:
        """Return the state before the first update, zeros; ``step`` counts the updates of all."""
        device = next((w.device for w in weights.values()), None)
        return {
            "exp_avg": {k: torch.zeros_like(w) for k, w in weights.items()},
            "exp_avg_sq": {k: torch.zeros_like(w) for k, w in weights.items()},
            "step": {"all": torch.zeros((), dtype=torch.float32, device=device)},
        }

    def update(
        self, weights: Tensors, grads: Tensors, slots: Slots, when: Tensor | None = None
    ) -> tuple[Tensors, Slots]:
        """Return new weights and slots; a tensor without gradient stays as it is."""
        names = list(grads)
        grad: Listed = list(grads.values())
        values = [weights[k] for k in names]
        beta1, beta2 = self.betas
        if self.weight_decay and self._coupled:
            grad = torch._foreach_add(grad, values, alpha=self.weight_decay)
        first = torch._foreach_lerp([slots["exp_avg"][k] for k in names], grad, 1 - beta1)
        second = torch._foreach_mul([slots["exp_avg_sq"][k] for k in names], beta2)
        torch._foreach_addcmul_(second, grad, grad, value=1 - beta2)
        step = slots["step"]["all"] + 1
        root = torch._foreach_div(second, self._correction(step, beta2, values))
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, self.eps)
        torch._foreach_mul_(root, self._correction(step, beta1, values))
        change = torch._foreach_div(first, root)
        torch._foreach_mul_(change, -self.lr)
        if self.weight_decay and not self._coupled:
            values = list(torch._foreach_mul(values, 1 - self.lr * self.weight_decay))
        after = {
            "exp_avg": _put(slots["exp_avg"], first, names, when),
            "exp_avg_sq": _put(slots["exp_avg_sq"], second, names, when),
            "step": {"all": gate(when, step, slots["step"]["all"])},
        }
        return _put(weights, torch._foreach_add(values, change), names, when), after

    def _correction(self, step: Tensor, beta: float, values: list[Tensor]) -> list[Tensor]:
        """Return ``1 - beta ** step``, for the zeros that the moments began with."""
        made: dict[tuple[torch.dtype, int], Tensor] = {}
        for value in values:
            key = (value.dtype, value.dim())
            if key not in made:
                count = _like(step.to(value.dtype), value)
                made[key] = -torch.expm1(count * math.log(beta))
        return [made[value.dtype, value.dim()] for value in values]


@dataclass(frozen=True)
class AdamW(Adam):
    """AdamW, equal to ``torch.optim.AdamW`` to rounding: Adam whose decay is of the weights alone.

    Args:
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: share of each weight that goes at every update, times the learning rate.
    """

    weight_decay: float = 0.01

    _coupled: ClassVar[bool] = False
