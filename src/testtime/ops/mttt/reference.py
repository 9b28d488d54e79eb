"""The form to read beside the paper: the inner gradient is automatic.

``W_t = W_{t-1} - eta_t grad l(W_{t-1})`` for t = 1..T on the tokens of each image and head, then
``o = f(q; W_T)``. Source: arXiv 2310.13807, section 2.
"""

import torch
from torch import Tensor
from torch.func import grad

from testtime.ops.mttt.learners import Learner
from testtime.ops.mttt.objectives import Objective
from testtime.ops.mttt.problem import Problem, Tokens, Weights, descend
from testtime.ops.mttt.squash import squash


def run(
    problem: Problem, learner: Learner, objective: Objective
) -> tuple[Tensor, Tensor | None, Weights]:
    """Return what :func:`testtime.ops.mttt.mttt` returns."""

    def loss(w: Weights, tokens: Tokens) -> Tensor:
        return objective.loss(learner.predict(w, tokens.u), tokens)

    def gradient(w: Weights, tokens: Tokens) -> Weights:
        def total(w: Weights) -> Tensor:  # images and heads do not mix: each gets its own gradient
            return loss(w, tokens).sum()

        # The first can be checkpointed, the second compiled, and used where gradients are off.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            leaves = {name: _differentiable(value) for name, value in w.items()}
            found = torch.autograd.grad(total(leaves), [*leaves.values()], create_graph=True)
            grads = dict(zip(leaves, found, strict=True))
        else:
            grads = grad(total)(w)
        return squash(grads, getattr(learner, "column", ())) if objective.squash else grads

    return descend(problem, learner.predict, gradient, loss)


def _differentiable(w: Tensor) -> Tensor:
    return w if w.requires_grad else w.detach().requires_grad_()
