"""The public function: checks its arguments, chooses a form, runs it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from testtime._suggest import suggest
from testtime.ops.mttt import explicit, moments, reference, written
from testtime.ops.mttt.checks import check, rank
from testtime.ops.mttt.learners import GLU, MLP, DepthwiseConv, Linear, Module, Written
from testtime.ops.mttt.objectives import Decoder, Dot, Objective
from testtime.ops.mttt.problem import Problem, Weights

FORMS = ("reference", "written", "moments", "narrow", "chunked")

CHUNK = 1024


class Choice(NamedTuple):
    """A form and why it is the one."""

    form: str
    reason: str


def mttt(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    w0: Mapping[str, Tensor],
    decoder: Decoder | Dot,
    *,
    learner: str | nn.Module = "mlp",
    steps: int = 1,
    inner_lr: float | Sequence[float] | Tensor = 1.0,
    order: Tensor | None = None,
    max_steps: int | None = None,
    key_padding_mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    differentiate: bool = True,
    losses: bool = False,
    state: bool = False,
    form: str = "auto",
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor | None, Weights | None]:
    """Fit a learner to the tokens of each image by gradient descent, and answer the queries.

    Each image and head starts from ``w0``, takes ``steps`` steps on its own tokens, and answers
    with ``f(q; W_T)``; the gradient of whatever follows goes through the steps.

    Half-precision inputs are computed in float32 and answered in their own dtype; autocast is off
    inside. A value that is not finite spoils the answers of its own image alone. Every form works
    under ``torch.compile(fullgraph=True)``, activation checkpointing, ``no_grad`` and
    ``inference_mode``; a module as learner and ``form="reference"`` either compile or are
    checkpointed, not both at once. A second derivative have all forms but ``narrow`` and
    ``chunked``, which refuse it.

    Args:
        q: queries ``[B, H, N, P]``, any number of them.
        k: what the learner is shown while it is fitted, ``[B, H, N, P]``.
        x: what its decoded prediction is held against: tokens ``[B, N, D]`` under a ``Decoder``,
            values ``[B, H, N, P]`` under ``Dot``.
        w0: the learner's first weights by name, ``[H, ...]``, or ``[B, H, ...]`` where they differ
            by image; matrices are [in, out], biases may be left out. ``linear``: ``weight``,
            ``bias``; ``mlp``: ``weight_1``, ``bias_1``, ``weight_2``, ``bias_2``; ``glu``:
            ``weight_1``, ``weight_2``; ``dwconv``: ``weight`` ``[H, P, 3, 3]``; a module: its
            parameters, stacked.
        decoder: the objective, ``Decoder(...)`` or ``Dot(...)``.
        learner: ``"linear"``, ``"mlp"``, ``"glu"``, ``"dwconv"``, or a module from ``[n, P]`` to
            ``[n, P]``, to be differentiated automatically.
        steps: T; with none the answer is ``f(q; W_0)``.
        inner_lr: one rate, one a step (the last is repeated), or a tensor ``[T]`` or ``[T, H]``,
            which gets a gradient.
        order: for SGD, the tokens' order ``[N]`` or ``[H, N]``, cut into T blocks that differ by at
            most one token; none: every step takes all tokens. That it is a permutation is looked
            at on the CPU, and not inside ``torch.compile``.
        max_steps: take no more steps than this, of blocks still cut for ``steps``; the authors'
            layer stops at 4.
        key_padding_mask: ``[B, N]``, true at padded tokens: they are out of loss, sums and divisor.
        grid: rows and columns of the tokens, for ``dwconv``.
        differentiate: whether gradients go through the inner gradient. Without it k, x and the
            decoder get none: a diagnostic.
        losses: whether to return the losses.
        state: whether to return the adapted weights.
        form: one of ``FORMS``, or ``"auto"``: see :func:`chosen_form`. All compute the same.
        chunk_size: tokens at a time in the chunked form.

    Returns:
        The answers ``[B, H, N, P]``; the losses ``[B, H, T + 1]`` before each step on its tokens
        and at last on all tokens, without gradient, or none; the adapted weights
        ``[B, H, ...]``, with gradient, or none.

    Raises:
        ValueError, TypeError: an argument is wrong; the message says which and what to do.

    Source: Sun et al., "Learning to (learn at test time)", arXiv 2310.13807; Han et al., "ViT^3",
    arXiv 2512.01643, for ``glu``, ``dwconv`` and ``Dot``.
    """
    check(q, k, x, w0, decoder, learner, steps, order, key_padding_mask, grid, max_steps)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; give a number of tokens, 1 or more.")
    taken = steps if max_steps is None else min(steps, max_steps)
    name = _form(form, k.shape[2], learner, decoder, taken, order, chunk_size)
    with torch.autocast(q.device.type, enabled=False):
        problem = _problem(
            *(q, k, x, w0, learner, steps, taken, inner_lr, order, key_padding_mask),
            *(differentiate, losses),
        )
        objective = _widened(decoder, problem.q.dtype)
        o, found, w = _run(name, problem, learner, objective, grid, chunk_size)
    return o.to(q.dtype), found, w if state else None


def chosen_form(
    tokens: int,
    *,
    learner: str | nn.Module = "mlp",
    decoder: Decoder | Dot | None = None,
    steps: int = 1,
    sgd: bool = False,
    norm: bool | None = None,
    chunk_size: int = CHUNK,
) -> Choice:
    """Return the form that ``form="auto"`` takes, and why.

    Args:
        tokens: N.
        learner: as for :func:`mttt`.
        decoder: as for :func:`mttt`; none: a reconstruction.
        steps: T.
        sgd: whether an order is given.
        norm: whether the decoder has a LayerNorm; by default as ``decoder`` says.
        chunk_size: tokens at a time in the chunked form.
    """
    if norm is None:
        norm = isinstance(decoder, Decoder) and decoder.scale is not None
    if isinstance(learner, nn.Module):
        return Choice("reference", "the gradient of a module has to be automatic")
    if isinstance(decoder, Dot) or learner in ("glu", "dwconv"):
        return Choice("written", "the only fast form of the dot product and of ViT^3's learners")
    if steps == 0:
        return Choice("written", "no step is taken, so there is nothing to save")
    if learner == "linear" and not norm and steps == 1 and not sgd:
        return Choice("moments", "one step of a linear learner on all tokens without LayerNorm")
    kept = "keeps its inputs and the adapted weights alone, in the time of the written form"
    if tokens > chunk_size:
        return Choice("chunked", f"{kept}; {tokens} tokens are more than {chunk_size}")
    return Choice("narrow", kept)


def _form(
    form: str,
    tokens: int,
    learner: str | nn.Module,
    objective: Objective,
    steps: int,
    order: Tensor | None,
    chunk_size: int,
) -> str:
    """Return the form to take; refuse one that has no such case."""
    if form == "auto":
        return chosen_form(
            tokens,
            learner=learner,
            decoder=objective,
            steps=steps,
            sgd=order is not None,
            chunk_size=chunk_size,
        ).form
    if form not in FORMS:
        raise ValueError(
            f"There is no form '{form}' (known: auto, {', '.join(FORMS)}).{suggest(form, FORMS)}"
        )
    norm = isinstance(objective, Decoder) and objective.scale is not None
    lacks = ""
    if form != "reference" and isinstance(learner, nn.Module):
        lacks = "no case for a module"
    elif form in ("narrow", "chunked") and not (
        isinstance(objective, Decoder) and learner in ("linear", "mlp")
    ):
        lacks = "cases for the linear and the mlp learner under a Decoder only"
    elif form == "moments" and not (
        learner == "linear"
        and isinstance(objective, Decoder)
        and not norm
        and steps == 1
        and order is None
    ):
        lacks = (
            "a case for one step of the linear learner on all tokens, under a Decoder without "
            "LayerNorm, only"
        )
    if lacks:
        raise ValueError(f"The form '{form}' has {lacks}. Choose form='auto'.")
    return form


def _run(
    form: str,
    problem: Problem,
    learner: str | nn.Module,
    objective: Objective,
    grid: tuple[int, int] | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None, Weights]:
    if isinstance(learner, nn.Module):
        return reference.run(problem, Module(learner), objective)
    if form in ("narrow", "chunked"):
        assert isinstance(objective, Decoder)
        chunk = chunk_size if form == "chunked" else max(problem.q.shape[2], problem.k.shape[2])
        simple = Linear() if learner == "linear" else MLP()
        return explicit.run(problem, simple, objective, chunk, form)
    if form == "moments":
        assert isinstance(objective, Decoder)
        return moments.run(problem, Linear(), objective)
    run = reference.run if form == "reference" else written.run
    return run(problem, _built(learner, grid), objective)


def _built(learner: str, grid: tuple[int, int] | None) -> Written:
    if learner == "dwconv":
        assert grid is not None
        return DepthwiseConv(grid)
    if learner == "glu":
        return GLU()
    return Linear() if learner == "linear" else MLP()


def _problem(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    w0: Mapping[str, Tensor],
    learner: str | nn.Module,
    steps: int,
    taken: int,
    inner_lr: float | Sequence[float] | Tensor,
    order: Tensor | None,
    key_padding_mask: Tensor | None,
    differentiate: bool,
    losses: bool,
) -> Problem:
    """Return everything in one dtype, float32 at least, with padded tokens zero."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads = k.shape[:2]
    q, k, x = q.to(dtype), k.to(dtype), x.to(dtype)
    if x.dim() == 3:
        x = x[:, None]
    valid = None
    if key_padding_mask is not None:
        keep = ~key_padding_mask[:, None, :, None]
        valid = keep.to(dtype)
        k, x = torch.where(keep, k, 0), torch.where(keep, x, 0)
        if learner == "dwconv":  # whose queries are a grid too
            q = torch.where(keep, q, 0)
    weights = {}
    for name, w in w0.items():
        weights[name] = w.to(dtype).expand(batch, heads, *w.shape[-rank(name, learner) :])
    if order is not None:
        order = order.expand(heads, -1)[None]
    rates = _rates(inner_lr, steps, heads, q)
    return Problem(q, k, x, weights, valid, order, rates, steps, taken, differentiate, losses)


def _rates(inner_lr: float | Sequence[float] | Tensor, steps: int, heads: int, q: Tensor) -> Tensor:
    """Return the rates [T, H]."""
    if not isinstance(inner_lr, Tensor):
        given = [inner_lr] if isinstance(inner_lr, int | float) else list(inner_lr)
        if not given or len(given) > max(steps, 1):
            raise ValueError(
                f"inner_lr has {len(given)} rates for {steps} steps; give one for all, or at most "
                "one a step (the last is repeated)."
            )
        inner_lr = q.new_tensor(given)
    elif (
        inner_lr.dim() not in (1, 2)
        or not 1 <= inner_lr.shape[0] <= max(steps, 1)
        or inner_lr.shape[1:] not in ((), (1,), (heads,))
    ):
        raise ValueError(
            f"inner_lr has the shape {[*inner_lr.shape]}; give [T] or [T, {heads}], with T at most "
            f"{max(steps, 1)}."
        )
    rates = inner_lr.to(q.dtype).view(inner_lr.shape[0], -1)
    more = rates[-1:].expand(max(steps - rates.shape[0], 0), -1)
    return torch.cat([rates, more]).expand(-1, heads)


def _widened(objective: Objective, dtype: torch.dtype) -> Objective:
    if isinstance(objective, Dot):
        return objective
    weight, bias, scale, shift, eps = objective
    return Decoder(
        weight.to(dtype),
        bias.to(dtype),
        None if scale is None else scale.to(dtype),
        None if shift is None else shift.to(dtype),
        eps,
    )
