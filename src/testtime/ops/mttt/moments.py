"""The linear learner without LayerNorm: its gradient from two moments of the tokens.

With u the keys, v = (x - g_b) G^T, A = u^T u, a = sum u, B = u^T v and S = G G^T:
``A W S + a (b S)^T - B`` is the gradient of W and ``W^T a S + n b S - sum v`` that of b, both times
n D / H. Where W = 0 and there is no bias, that is linear attention.
"""

import torch.nn.functional as F
from torch import Tensor

from testtime.ops.mttt.learners import Linear
from testtime.ops.mttt.objectives import Decoder, masked
from testtime.ops.mttt.problem import Problem, Tokens, Weights, descend
from testtime.ops.mttt.written import normalised


def run(
    problem: Problem, learner: Linear, decoder: Decoder
) -> tuple[Tensor, Tensor | None, Weights]:
    """Return what :func:`testtime.ops.mttt.mttt` returns."""
    square = decoder.weight @ decoder.weight.mT

    def gradient(w: Weights, tokens: Tokens) -> Weights:
        u, v = tokens.u, masked(values(tokens.x, decoder), tokens.valid)
        target = w["weight"] @ square
        sums = {"weight": (u.mT @ u) @ target - u.mT @ v}
        if "bias" in w:
            bias = w["bias"].unsqueeze(-2) @ square  # [B, H, 1, P]
            total = u.sum(-2, keepdim=True)
            count = tokens.total()
            if isinstance(count, Tensor):
                count = count[..., None, None]
            sums["weight"] = sums["weight"] + total.mT @ bias
            moved = total @ target + count * bias
            sums["bias"] = moved.squeeze(-2) - v.sum(-2)
        return normalised(sums, decoder.normaliser(tokens))

    def loss(w: Weights, tokens: Tokens) -> Tensor:
        return decoder.loss(learner.predict(w, tokens.u), tokens)

    return descend(problem, learner.predict, gradient, loss)


def values(x: Tensor, decoder: Decoder) -> Tensor:
    """Return (x - g_b) G^T as [B, H, n, P], of tokens [B, 1 or H, n, D]."""
    weight, bias = decoder.weight, decoder.bias
    if x.shape[1] > 1:
        return (x - bias) @ weight.mT
    # One product for all heads, so that the tokens are not repeated for each.
    heads, width, _ = weight.shape
    v = F.linear(x[:, 0] - bias, weight.flatten(0, 1))
    return v.view(*v.shape[:2], heads, width).transpose(1, 2)
