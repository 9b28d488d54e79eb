"""What every form is given: the tokens of each inner step, and the rates.

Shapes: B images, H heads, N tokens, P head width, D token width, T steps.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Tokens(NamedTuple):
    """The tokens of one inner step; those that are not valid count in no sum."""

    u: Tensor  # [B, H, n, P], what the learner is shown
    x: Tensor  # [B, 1 or H, n, D], what its prediction is held against
    valid: Tensor | None  # [B, 1 or H, n, 1], one or zero

    def total(self) -> int | Tensor:
        """Return how many are valid: a number, or [B, 1 or H]; at least one."""
        if self.valid is None:
            return self.u.shape[2]
        return self.valid.sum((-2, -1)).clamp(min=1)


class Problem(NamedTuple):
    """One call of the operator, checked and in one dtype."""

    q: Tensor  # [B, H, N, P]
    k: Tensor  # [B, H, N, P]
    x: Tensor  # [B, 1 or H, N, D]
    w0: Weights  # [B, H, ...] each
    valid: Tensor | None  # [B, 1, N, 1]
    order: Tensor | None  # [1, H, N]
    rates: Tensor  # [T, H]
    steps: int  # blocks that an order is cut into
    taken: int  # steps that are taken
    differentiate: bool
    wants_losses: bool

    def tokens(self) -> Tokens:
        """Return all tokens."""
        return Tokens(self.k, self.x, self.valid)

    def block(self, step: int) -> Tokens:
        """Return the tokens of one inner step."""
        if self.order is None:
            return self.tokens()
        index = self.order.tensor_split(self.steps, -1)[step]
        heads = self.k.shape[1]
        valid = self.valid
        return Tokens(
            take(self.k, index),
            take(self.x.expand(-1, heads, -1, -1), index),
            None if valid is None else take(valid.expand(-1, heads, -1, -1), index),
        )


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens [B, H, n, P] of x [B, H, N, P] that index [1, H, n] names."""
    return x.gather(2, index[..., None].expand(x.shape[0], -1, -1, x.shape[-1]))


def over(numbers: Tensor, like: Tensor) -> Tensor:
    """Return numbers [H] or [B, H], to multiply or divide a gradient [B, H, ...]."""
    return numbers.view(*numbers.shape, *[1] * (like.dim() - 2))


def random_order(
    heads: int,
    tokens: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return an order [H, N] of the tokens for each head, as the authors draw it.

    That is a stable argsort of uniform single-precision draws, made on the generator's device.
    """
    source = generator.device if generator is not None else device
    draws = torch.rand(heads, tokens, generator=generator, device=source, dtype=torch.float32)
    return draws.argsort(dim=-1, stable=True).to(device)


Gradient = Callable[[Weights, Tokens], Weights]
Loss = Callable[[Weights, Tokens], Tensor]
Predict = Callable[[Weights, Tensor], Tensor]


def descend(
    problem: Problem, predict: Predict, gradient: Gradient, loss: Loss
) -> tuple[Tensor, Tensor | None, Weights]:
    """Take the inner steps by plain gradient descent, then answer the queries.

    Returns:
        o [B, H, N, P]; the losses [B, H, T + 1] if they are wanted, without gradient, the last one
        on all tokens; the adapted weights.
    """
    w, losses = problem.w0, []
    for step in range(problem.taken):
        tokens = problem.block(step)
        if problem.wants_losses:
            losses.append(_without_gradient(loss, w, tokens))
        grads = gradient(w, tokens)
        if not problem.differentiate:
            grads = {name: g.detach() for name, g in grads.items()}
        w = {name: w[name] - over(problem.rates[step], g) * g for name, g in grads.items()}
    if problem.wants_losses:
        losses.append(_without_gradient(loss, w, problem.tokens()))
    o = predict(w, problem.q)
    return o, torch.stack(losses, -1) if losses else None, w


def _without_gradient(loss: Loss, w: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
    with torch.no_grad():
        return loss({name: value.detach() for name, value in w.items()}, tokens)
