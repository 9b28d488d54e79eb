"""TTT token by token, as it is defined: slow, by automatic differentiation, to be read and held to.

Source: arXiv 2407.04620, sections 2.1 to 2.4; the position coefficient is in their code only.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor, Sequence[Tensor]], Tensor]


def token_by_token(
    f: Function,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    coefficient: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    start: Sequence[Tensor],
    eps: float = 1e-6,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the outputs, the parameters at the unfinished chunk's start, and its sums A.

    Args:
        f: the inner model before its norm, from [B, H, 1, D] and parameters [B, H, ...].
        q: queries, [B, H, T, D].
        k: keys.
        v: values.
        lr: inner learning rates, [B, H, T].
        coefficient: by position in the chunk, [K].
        norm_weight: of the inner LayerNorm, [H, D].
        norm_bias: likewise.
        start: parameters, [H, ...] or [B, H, ...].
        eps: of the inner LayerNorm.
    """
    weight, bias = norm_weight[:, None], norm_bias[:, None]

    def predict(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return F.layer_norm(f(x, parameters), x.shape[-1:], eps=eps) * weight + bias

    chunk, outputs = len(coefficient), []
    now = [p.expand(*q.shape[:2], *p.shape[-2:]) for p in start]
    with torch.enable_grad():
        now = [p if p.requires_grad else p.detach().requires_grad_() for p in now]
        total = [torch.zeros_like(p) for p in now]
        for t, (q_t, k_t, v_t, lr_t) in enumerate(
            zip(*(torch.split(x, 1, 2) for x in (q, k, v, lr[..., None])), strict=True)
        ):
            loss = (predict(k_t, now) - (v_t - k_t)).square().sum() / 2
            gradients = torch.autograd.grad(loss, now, create_graph=True)
            total = [a + lr_t * g for a, g in zip(total, gradients, strict=True)]
            c = coefficient[t % chunk]
            moved = [p - c * a for p, a in zip(now, total, strict=True)]
            outputs.append(q_t + predict(q_t, moved))
            if (t + 1) % chunk == 0:
                now, total = moved, [torch.zeros_like(p) for p in now]
    return torch.cat(outputs, 2), now, total
