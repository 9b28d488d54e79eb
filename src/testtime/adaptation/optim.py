"""Optimisers as pure update rules: tensors in, new tensors out, nothing kept."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Slots = dict[str, Tensors]


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
        weights, slots = dict(weights), {slot: dict(held) for slot, held in slots.items()}
        for name, grad in grads.items():
            weight = weights[name]
            if self.weight_decay:
                grad = grad.add(weight, alpha=self.weight_decay)
            if self.momentum:
                held = slots["momentum_buffer"]
                moved = held[name].mul(self.momentum).add_(grad)
                held[name] = gate(when, moved, held[name])
                grad = grad.add(moved, alpha=self.momentum) if self.nesterov else moved
            weights[name] = gate(when, weight.add(grad, alpha=-self.lr), weight)
        return weights, slots


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

    def slots(self, weights: Tensors) -> Slots:
        """Return the state before the first update, zeros; ``step`` counts updates."""
        zeros = {k: torch.zeros_like(w) for k, w in weights.items()}
        step = {k: w.new_zeros((), dtype=torch.float32) for k, w in weights.items()}
        return {
            "exp_avg": zeros,
            "exp_avg_sq": {k: z.clone() for k, z in zeros.items()},
            "step": step,
        }

    def update(
        self, weights: Tensors, grads: Tensors, slots: Slots, when: Tensor | None = None
    ) -> tuple[Tensors, Slots]:
        """Return new weights and slots; a tensor without gradient stays as it is."""
        weights, slots = dict(weights), {slot: dict(held) for slot, held in slots.items()}
        beta1, beta2 = self.betas
        for name, grad in grads.items():
            weight, old = weights[name], {slot: held[name] for slot, held in slots.items()}
            if self.weight_decay:
                grad = grad.add(weight, alpha=self.weight_decay)
            first = old["exp_avg"].lerp(grad, 1 - beta1)
            second = old["exp_avg_sq"].mul(beta2).addcmul_(grad, grad, value=1 - beta2)
            step = old["step"] + 1
            count = _like(step.to(weight.dtype), weight)
            root = (second / -torch.expm1(count * math.log(beta2))).sqrt_().add_(self.eps)
            size = self.lr / -torch.expm1(count * math.log(beta1))
            moved = {"exp_avg": first, "exp_avg_sq": second, "step": step}
            for slot, value in moved.items():
                slots[slot][name] = gate(when, value, old[slot])
            weights[name] = gate(when, weight - size * first / root, weight)
        return weights, slots
