"""Forward and backward by hand, over blocks of tokens; inputs and adapted weights alone are kept.

The inner gradient is a sum over tokens, and what goes back through a step is token-wise once the
gradient of the weights after it is known. So each way is made of sweeps over blocks of tokens:
forward one a step for the weights and one for the answers; backward one for the gradient of the
adapted weights and one a step, from the last to the first, for the rest. Under one block for all
tokens this is the narrow form, under several the chunked one. A letter with a trailing underscore
is the gradient of the outer loss.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from testtime.ops.mttt.gelu import curvature, gelu, times_slope
from testtime.ops.mttt.learners import MLP, Linear, affine, present
from testtime.ops.mttt.narrow import Narrow, Sums, narrow
from testtime.ops.mttt.objectives import Decoder, masked
from testtime.ops.mttt.problem import Problem, Weights, over, take

Place = slice | Tensor  # which tokens: a stretch of them, or an index [1, H, n]


class _Plan(NamedTuple):
    """What is no tensor."""

    names: tuple[str, ...]
    eps: float
    steps: int
    taken: int
    differentiate: bool
    wants_losses: bool
    chunk: int
    form: str


def run(
    problem: Problem, learner: Linear | MLP, decoder: Decoder, chunk: int, form: str
) -> tuple[Tensor, Tensor | None, Weights]:
    """Return what :func:`testtime.ops.mttt.mttt` returns."""
    names = tuple(problem.w0)
    plan = _Plan(
        *(names, decoder.eps, problem.steps, problem.taken, problem.differentiate),
        *(problem.wants_losses, chunk, form),
    )
    o, losses, *w = _Explicit.apply(  # type: ignore[no-untyped-call]
        *(plan, problem.q, problem.k, problem.x[:, 0], problem.valid, problem.order),
        *(problem.rates, *decoder[:4], *problem.w0.values()),
    )
    return o, losses if problem.wants_losses else None, dict(zip(names, w, strict=True))


class _Explicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Any) -> tuple[Tensor, ...]:
        # Not as parameters of their own: without gradients torch.compile (2.13) takes a forward by
        # the number of those, and miscounts where that is one less than the arguments.
        q, k, x, valid, order, rates, g, g_b, scale, shift, *w0 = tensors
        inner = narrow(Decoder(g, g_b, scale, shift, plan.eps))
        sweep = _Sweep(plan, inner, k, x, valid, order)
        w, kept, deltas, losses = dict(zip(plan.names, w0, strict=True)), [], [], []
        for step in range(plan.taken):
            kept.append(w)
            delta, loss = sweep.step(w, step)
            losses.append(loss)
            deltas.append(delta)
            w = {n: w[n] - over(rates[step], d) * d for n, d in delta.items()}
        o = torch.empty_like(q)
        for place in _stretches(q.shape[2], plan.chunk):
            o[:, :, place] = _predict(w, q[:, :, place])
        if plan.wants_losses:
            losses.append(sweep.loss(w))
        history = [tensor for weights in kept for tensor in weights.values()]
        # Rates that are learned need the gradients themselves.
        if not ctx.needs_input_grad[6]:
            deltas = []
        moved = [tensor for delta in deltas for tensor in delta.values()]
        saved = (q, k, x, valid, order, rates, g, g_b, scale, shift)
        ctx.save_for_backward(*saved, *w.values(), *history, *moved)
        ctx.plan = plan
        found = torch.stack(losses, -1) if plan.wants_losses else q.new_empty(0)
        ctx.mark_non_differentiable(found)
        # The weights are outputs of their own: what was not moved is not handed through.
        return o, found, *(t.clone() if plan.taken == 0 else t for t in w.values())

    @staticmethod
    def backward(ctx: Any, o_: Tensor, _: Any, *w_: Tensor) -> tuple[Any, ...]:
        plan: _Plan = ctx.plan
        q, k, x, valid, order, rates, g, g_b, scale, shift, *rest = ctx.saved_tensors
        size = len(plan.names)
        groups = [
            dict(zip(plan.names, rest[i : i + size], strict=True))
            for i in range(0, len(rest), size)
        ]
        w, kept, deltas = groups[0], groups[1 : 1 + plan.taken], groups[1 + plan.taken :]
        with torch.no_grad():
            inner = narrow(Decoder(g, g_b, scale, shift, plan.eps))
            sweep = _Sweep(plan, inner, k, x, valid, order)
            of_w = dict(zip(plan.names, w_, strict=True))
            q_ = torch.empty_like(q)
            for place in _stretches(q.shape[2], plan.chunk):
                q_[:, :, place], sums = _predict_back(w, q[:, :, place], o_[:, :, place])
                of_w = {n: of_w[n] + sums[n] for n in plan.names}
            rates_ = torch.zeros_like(rates) if deltas else None
            for step in reversed(range(plan.taken if plan.differentiate or deltas else 0)):
                if rates_ is not None:
                    rates_[step] = -sum(
                        (of_w[n] * d).flatten(2).sum((0, 2)) for n, d in deltas[step].items()
                    )
                if plan.differentiate:
                    of_w = sweep.step_back(kept[step], step, of_w, rates)
            x_, *decoder_ = sweep.finish()
        grads = (q_, sweep.k_, x_, None, None, rates_, *decoder_, *of_w.values())
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _Final.apply(plan.form, o_, *grads)  # type: ignore[no-untyped-call]
        return (None, *grads)


class _Final(torch.autograd.Function):
    """Hands gradients on, and refuses to be differentiated."""

    @staticmethod
    def forward(
        ctx: Any, form: str, o_: Tensor, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.form = form
        return tuple(None if g is None else g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"The {ctx.form} form of mttt has a first derivative only. For a second one (double "
            "backward, gradient penalties) choose form='written' or form='reference'."
        )


class _Sweep:
    """Sums over the tokens of a step, block by block, and the gradients of the tokens."""

    def __init__(
        self,
        plan: _Plan,
        inner: Narrow,
        k: Tensor,
        x: Tensor,
        valid: Tensor | None,
        order: Tensor | None,
    ) -> None:
        self.plan, self.inner, self.k, self.x, self.order = plan, inner, k, x, order
        self.valid = None if valid is None else valid.expand(-1, k.shape[1], -1, -1)
        self.v, t = inner.values(x)
        self.t = t.expand(-1, k.shape[1], -1, -1)
        # What |R|^2 has beside the square error that the narrow form knows, [B, H, N, 1].
        shift, heads = inner.decoder.shift, k.shape[1]
        if plan.wants_losses:
            rest = x.square().sum(-1)[:, None]
            if shift is not None:
                rest = rest - 2 * (x @ shift.mT).mT + shift.square().sum(-1)[:, None]
            self.rest = rest[..., None].expand(-1, heads, -1, -1)
        self.sums: Sums = {}
        self.k_ = self.v_ = self.t_ = torch.empty(0)

    def places(self, step: int) -> Iterator[Place]:
        """Yield the tokens of a step, block by block."""
        if self.order is None:
            yield from _stretches(self.k.shape[2], self.plan.chunk)
        else:
            block = self.order.tensor_split(self.plan.steps, -1)[step]
            yield from torch.split(block, self.plan.chunk, -1)

    def step(self, w: Weights, step: int) -> tuple[Weights, Tensor]:
        """Return the inner gradient at w, and the loss there if it is wanted."""
        total: Weights = {}
        loss = self.k.new_zeros(self.k.shape[:2])
        for place in self.places(step):
            u, v, t, valid = self._at(place)
            m, grads = _gradient(w, u, lambda m, v=v, t=t: self.inner.error(m, v, t), valid)
            total = _add(total, grads)
            if self.plan.wants_losses:
                loss = loss + self._square(m, place)
        divisor = self._normaliser(step)
        return {n: g / over(divisor, g) for n, g in total.items()}, loss / (2 * divisor)

    def loss(self, w: Weights) -> Tensor:
        """Return the loss [B, H] at w on all tokens."""
        places = _stretches(self.k.shape[2], self.plan.chunk)
        squares = [self._square(_predict(w, self.k[:, :, p]), p) for p in places]
        return torch.stack(squares).sum(0) / (2 * self._normaliser(None))

    def step_back(self, w: Weights, step: int, of_w: Weights, rates: Tensor) -> Weights:
        """Return the gradient of w from that of the weights after the step; add the tokens'."""
        if self.k_.numel() == 0:
            self.k_, self.v_ = torch.zeros_like(self.k), torch.zeros_like(self.v)
            self.t_ = torch.zeros_like(self.k[..., :1])
        divisor = self._normaliser(step)
        c = {n: -over(rates[step], g) * g / over(divisor, g) for n, g in of_w.items()}
        for place in self.places(step):
            u, v, t, valid = self._at(place)
            u_, v_, t_, grads, sums = _gradient_back(w, u, v, t, valid, self.inner, c)
            of_w = _add(of_w, grads)
            self.sums = _add(self.sums, sums)
            for whole, part in ((self.k_, u_), (self.v_, v_), (self.t_, t_)):
                _put(whole, place, part)
        return of_w

    def finish(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the decoder."""
        if not self.sums:
            self.k_ = torch.zeros_like(self.k)
            decoder = self.inner.decoder[:4]
            return tuple(None if t is None else torch.zeros_like(t) for t in (self.x, *decoder))
        return self.inner.finish(self.x, self.v_, self.t_, self.sums)

    def _at(self, place: Place) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        valid = None if self.valid is None else _take(self.valid, place)
        return _take(self.k, place), _take(self.v, place), _take(self.t, place), valid

    def _normaliser(self, step: int | None) -> Tensor:
        """Return n D / H, [B or 1, H or 1], of a step's tokens or of all."""
        heads, _, width = self.inner.decoder.weight.shape
        index = None
        if self.order is not None and step is not None:
            index = self.order.tensor_split(self.plan.steps, -1)[step]
        if self.valid is None:
            n = self.k.shape[2] if index is None else index.shape[-1]
            return self.k.new_full((1, 1), n * (width / heads))
        valid = self.valid if index is None else take(self.valid, index)
        return valid.sum((-2, -1)).clamp(min=1) * (width / heads)

    def _square(self, m: Tensor, place: Place) -> Tensor:
        _, v, t, valid = self._at(place)
        square = self.inner.square_error(m, v, t) + _take(self.rest, place)
        return masked(square, valid).sum((-2, -1))


def _predict(w: Weights, u: Tensor) -> Tensor:
    return (Linear() if "weight" in w else MLP()).predict(w, u)


def _predict_back(w: Weights, q: Tensor, o_: Tensor) -> tuple[Tensor, Weights]:
    """Return the gradients of the queries and of the adapted weights."""
    if "weight" in w:
        return o_ @ w["weight"].mT, present(w, weight=q.mT @ o_, bias=o_.sum(-2))
    p = affine(q, w["weight_1"], w.get("bias_1"))
    p_ = times_slope(o_ @ w["weight_2"].mT, p)
    grads = present(
        w, weight_1=q.mT @ p_, bias_1=p_.sum(-2), weight_2=gelu(p).mT @ o_, bias_2=o_.sum(-2)
    )
    return p_ @ w["weight_1"].mT, grads


def _gradient(w: Weights, u: Tensor, error: Any, valid: Tensor | None) -> tuple[Tensor, Weights]:
    """Return the predictions and the sums of the inner gradient."""
    found: list[Tensor] = []

    def at(m: Tensor) -> Tensor:
        found.append(m)
        return masked(error(m), valid)

    grads = (Linear() if "weight" in w else MLP()).gradient(w, u, at)
    return found[0], grads


def _gradient_back(
    w: Weights,
    u: Tensor,
    v: Tensor,
    t: Tensor,
    valid: Tensor | None,
    inner: Narrow,
    c: Weights,
) -> tuple[Tensor, Tensor, Tensor, Weights, Sums]:
    """Return the gradients of u, v, t, of w and of the decoder's constants through one step.

    ``c`` is the gradient of the summed inner gradient.
    """
    if "weight" in w:
        m = affine(u, w["weight"], w.get("bias"))
        e_ = affine(u, c["weight"], c.get("bias"))
        e, m_, v_, t_, sums = inner.backward(m, v, t, masked(e_, valid))
        e = masked(e, valid)
        grads = present(w, weight=u.mT @ m_, bias=m_.sum(-2))
        return e @ c["weight"].mT + m_ @ w["weight"].mT, v_, t_, grads, sums
    p = affine(u, w["weight_1"], w.get("bias_1"))
    a = gelu(p)
    m = affine(a, w["weight_2"], w.get("bias_2"))
    d_ = affine(u, c["weight_1"], c.get("bias_1"))
    f_ = times_slope(d_, p)
    e_ = affine(a, c["weight_2"], c.get("bias_2")) + f_ @ w["weight_2"]
    e, m_, v_, t_, sums = inner.backward(m, v, t, masked(e_, valid))
    e = masked(e, valid)
    f = e @ w["weight_2"].mT
    d = times_slope(f, p)
    a_ = e @ c["weight_2"].mT + m_ @ w["weight_2"].mT
    p_ = d_ * f * curvature(p) + times_slope(a_, p)
    grads = present(
        w,
        weight_1=u.mT @ p_,
        bias_1=p_.sum(-2),
        weight_2=f_.mT @ e + a.mT @ m_,
        bias_2=m_.sum(-2),
    )
    return d @ c["weight_1"].mT + p_ @ w["weight_1"].mT, v_, t_, grads, sums


def _stretches(tokens: int, chunk: int) -> Iterator[slice]:
    for start in range(0, tokens, chunk):
        yield slice(start, min(start + chunk, tokens))


def _take(x: Tensor, place: Place) -> Tensor:
    return x[:, :, place] if isinstance(place, slice) else take(x, place)


def _put(whole: Tensor, place: Place, part: Tensor) -> None:
    """Add what belongs to some tokens."""
    if isinstance(place, slice):
        whole[:, :, place] += part
    else:
        index = place[..., None].expand(whole.shape[0], -1, -1, whole.shape[-1])
        whole.scatter_add_(2, index, part)


def _add(total: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: total[n] + g for n, g in more.items()} if total else more
