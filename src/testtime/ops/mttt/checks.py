"""What the operator refuses, and in which words."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from testtime._suggest import suggest
from testtime.ops.mttt.learners import NAMES
from testtime.ops.mttt.objectives import Decoder, Objective


def check(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    w0: Mapping[str, Tensor],
    objective: Objective,
    learner: str | nn.Module,
    steps: int,
    order: Tensor | None,
    key_padding_mask: Tensor | None,
    grid: tuple[int, int] | None,
    max_steps: int | None,
) -> None:
    """Raise a ValueError or TypeError that says what is wrong, what was found, what to do."""
    _check_tokens(q, k, x, objective)
    check_steps(steps, max_steps, k.shape[2], order is not None)
    if isinstance(learner, str) and learner not in NAMES:
        raise ValueError(
            f"There is no learner '{learner}' (known: {', '.join(NAMES)}, or a module)."
            f"{suggest(learner, NAMES)}"
        )
    _check_weights(w0, learner, k, objective)
    tokens = k.shape[2]
    if order is not None:
        _check_order(order, k.shape[1], tokens)
    if key_padding_mask is not None and (
        key_padding_mask.dtype != torch.bool or key_padding_mask.shape != (k.shape[0], tokens)
    ):
        raise ValueError(
            f"key_padding_mask is {key_padding_mask.dtype} of shape {[*key_padding_mask.shape]}; "
            f"give booleans [{k.shape[0]}, {tokens}], true at padded tokens."
        )
    if learner == "dwconv":
        check_grid(grid, tokens)
        if order is not None:
            raise ValueError(
                "A convolution learner works on the whole grid of tokens and cannot take them in "
                "an order; leave order out."
            )
        if q.shape != k.shape:
            raise ValueError(
                f"Queries and keys of a convolution learner lie on one grid, found "
                f"{[*q.shape]} and {[*k.shape]}."
            )


def check_steps(steps: int, max_steps: int | None, tokens: int, sgd: bool) -> None:
    """Refuse numbers of steps that make no sense."""
    if steps < 0 or (max_steps is not None and max_steps < 0):
        raise ValueError(
            f"steps is {steps} and max_steps {max_steps}; a number of inner steps is 0 or more."
        )
    if sgd and steps > tokens:
        raise ValueError(
            f"{tokens} tokens cannot be cut into {steps} blocks, one a step; take fewer steps."
        )


def check_grid(grid: tuple[int, int] | None, tokens: int) -> None:
    """Refuse a grid that does not hold the tokens."""
    if grid is None or len(grid) != 2 or grid[0] * grid[1] != tokens:
        raise ValueError(
            f"The grid {grid} does not hold {tokens} tokens; give (rows, columns) of that many."
        )


def _check_tokens(q: Tensor, k: Tensor, x: Tensor, objective: Objective) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q is {[*q.shape]} and k {[*k.shape]}; both are [B, H, N, P] and may differ in N only."
        )
    if not (q.is_floating_point() and k.is_floating_point() and x.is_floating_point()):
        raise TypeError(f"q, k and x are {q.dtype}, {k.dtype}, {x.dtype}; give floating tensors.")
    batch, heads, tokens, width = k.shape
    if tokens == 0:
        raise ValueError("There are no tokens to fit a learner to; give at least one.")
    if isinstance(objective, Decoder):
        token = objective.weight.shape[-1]
        if x.shape != (batch, tokens, token) or objective.weight.shape != (heads, width, token):
            raise ValueError(
                f"x is {[*x.shape]} and the decoder's weight {[*objective.weight.shape]}; k of "
                f"{[*k.shape]} needs x [{batch}, {tokens}, D] and a weight [{heads}, {width}, D]."
            )
        if objective.bias.shape != (token,):
            raise ValueError(
                f"The decoder's bias is {[*objective.bias.shape]}; give one [{token}], for all "
                "heads."
            )
        for name in ("scale", "shift"):
            found: Tensor | None = getattr(objective, name)
            other = objective.shift if name == "scale" else objective.scale
            if found is None and other is None:
                continue
            if found is None or found.shape != (heads, token):
                raise ValueError(
                    f"The decoder's {name} is {None if found is None else [*found.shape]}; its "
                    f"LayerNorm needs scale and shift, [{heads}, {token}] each, or neither."
                )
    elif x.shape != k.shape:
        raise ValueError(f"Under Dot x is values like k, {[*k.shape]}; found {[*x.shape]}.")


def rank(name: str, learner: str | nn.Module) -> int:
    """Return the dimensions of one weight of one head."""
    if isinstance(learner, nn.Module):
        return dict(learner.named_parameters())[name].dim()
    if learner == "dwconv":
        return 3
    return 1 if name.startswith("bias") else 2


def _check_weights(
    w0: Mapping[str, Tensor], learner: str | nn.Module, k: Tensor, objective: Objective
) -> None:
    batch, heads, _, width = k.shape
    if isinstance(learner, nn.Module):
        known = needed = tuple(name for name, _ in learner.named_parameters())
    else:
        known = NAMES[learner]
        needed = tuple(name for name in known if not name.startswith("bias"))
    if not set(needed) <= set(w0) <= set(known):
        raise ValueError(
            f"The learner's weights are called {', '.join(known)}; found {', '.join(w0)}."
        )
    for name, w in w0.items():
        dims = rank(name, learner)
        if w.shape[:-dims] not in ((heads,), (batch, heads), (1, heads)):
            raise ValueError(
                f"The learner's {name} is {[*w.shape]}; it begins with [{heads}], or with "
                f"[{batch}, {heads}] where it differs by image."
            )
    if isinstance(learner, str):
        _check_widths(w0, learner, width)
    if objective.squash and (
        isinstance(learner, nn.Module) or any(name.startswith("bias") for name in w0)
    ):
        raise ValueError(
            "Inner gradients are squashed by columns of matrices, which a bias and a module's "
            "parameters have not; leave the biases out, or give Dot(squash=False)."
        )


def _check_widths(w0: Mapping[str, Tensor], learner: str, width: int) -> None:
    if learner == "dwconv":
        good = w0["weight"].shape[-3:] == (width, 3, 3)
    elif learner == "mlp":
        into, out = w0["weight_1"], w0["weight_2"]
        good = into.shape[-2] == out.shape[-1] == width and into.shape[-1] == out.shape[-2]
        biases = (("bias_1", into.shape[-1]), ("bias_2", width))
        good = good and all(w0[n].shape[-1] == size for n, size in biases if n in w0)
    else:
        good = all(w.shape[-1] == width for w in w0.values())
        good = good and all(w0[n].shape[-2] == width for n in w0 if n.startswith("weight"))
    if not good:
        shapes = ", ".join(f"{name} {[*w.shape]}" for name, w in w0.items())
        raise ValueError(
            f"The {learner} learner's weights do not map {width} numbers to {width}: {shapes}. "
            "Its answers are the operator's, so it must keep a token's width."
        )


def _check_order(order: Tensor, heads: int, tokens: int) -> None:
    if order.dtype != torch.int64 or order.shape not in ((tokens,), (heads, tokens)):
        raise ValueError(
            f"order is {order.dtype} of shape {[*order.shape]}; give int64 [{tokens}] or "
            f"[{heads}, {tokens}]."
        )
    if order.device.type == "cpu" and not torch.compiler.is_compiling():
        every = torch.arange(tokens).expand_as(order)
        if not torch.equal(order.sort(-1).values, every):
            raise ValueError(
                f"order is no permutation: each row has to name every token from 0 to {tokens - 1} "
                "once."
            )
