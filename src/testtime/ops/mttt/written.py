"""The step written out: plain first-order differentiation goes through it."""

from torch import Tensor

from testtime.ops.mttt.learners import Written
from testtime.ops.mttt.objectives import Objective
from testtime.ops.mttt.problem import Problem, Tokens, Weights, descend, over
from testtime.ops.mttt.squash import squash


def run(
    problem: Problem, learner: Written, objective: Objective
) -> tuple[Tensor, Tensor | None, Weights]:
    """Return what :func:`testtime.ops.mttt.mttt` returns."""

    def gradient(w: Weights, tokens: Tokens) -> Weights:
        sums = learner.gradient(w, tokens.u, objective.error(tokens))
        grads = normalised(sums, objective.normaliser(tokens))
        return squash(grads, learner.column) if objective.squash else grads

    def loss(w: Weights, tokens: Tokens) -> Tensor:
        return objective.loss(learner.predict(w, tokens.u), tokens)

    return descend(problem, learner.predict, gradient, loss)


def normalised(sums: Weights, normaliser: float | Tensor) -> Weights:
    """Return sums [B, H, ...] divided by a number or by [B, 1 or H]."""
    if not isinstance(normaliser, Tensor):
        return {name: g / normaliser for name, g in sums.items()}
    return {name: g / over(normaliser, g) for name, g in sums.items()}
