"""The outer loop of MTTT: clipping, Adam with a bfloat16 first moment, schedule, mixup.

Source: arXiv 2310.13807; the details are those of the authors' code, which follows Beyer et al.,
"Better plain ViT baselines", arXiv 2205.01580.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class OfficialAdam(torch.optim.Optimizer):
    """Adam as MTTT is trained: global clipping, decoupled decay, a first moment in bfloat16.

    All gradients are first divided by their joint norm over ``clip`` where that is above 1, with no
    epsilon. The first moment is decayed and kept in bfloat16, and used before it is rounded. Decay
    is multiplied by the rate, as in ``AdamW``. No step looks at the host.

    >>> from testtime.models import ViT
    >>> model = ViT("mttt-mlp", image_size=32, patch_size=8, depth=1)
    >>> optimizer = OfficialAdam(parameter_groups(model), lr=1e-3)
    >>> schedule = torch.optim.lr_scheduler.LambdaLR(
    ...     optimizer, lambda step: warmup_cosine(step, total_steps=1000, warmup_steps=100)
    ... )

    Args:
        params: parameters or groups of them; those without gradient are passed over and do not
            count in the norm.
        lr: rate.
        betas: decays of the two moments.
        eps: added to the root of the second moment.
        weight_decay: a group's decay; the authors' 1e-4, added behind a rate of 1e-3, is 0.1 here.
        clip: largest joint norm of all gradients; none does not clip.

    Raises:
        ValueError: a number that is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: betas lie in "
                "[0, 1) and nothing is negative."
            )
        if clip is not None and clip <= 0:
            raise ValueError(f"clip is {clip}; give a positive norm, or None.")
        self.clip = clip
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; the closure, where there is one, is called with gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not grads:
            return loss
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(g).to(grads[0].device) for g in grads])
        )
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad
                if self.clip is not None:
                    near = norm.to(g)
                    g = torch.where(near < self.clip, g, g / near * self.clip)
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                t = state["step"].item()  # on the host, whatever device the parameters are on
                old = state["exp_avg"]
                first = (1 - beta1) * g + (old * old.new_tensor(beta1)).to(g.dtype)
                second = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                update = (first / (1 - beta1**t)) / (
                    (second / (1 - beta2**t)).sqrt() + group["eps"]
                )
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))
                old.copy_(first)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; the first moment stays in bfloat16."""
        super().load_state_dict(state_dict)  # which gives it the parameter's dtype
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].bfloat16()


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Return the trained parameters in two groups: kernels, which are decayed, and all others.

    Args:
        model: names what is not decayed by ``no_weight_decay()``, as timm's models do.
        weight_decay: of the kernels.

    Raises:
        TypeError: the model does not say what is not to be decayed.
    """
    if not callable(getattr(model, "no_weight_decay", None)):
        raise TypeError(
            f"{type(model).__name__} has no no_weight_decay(); make the groups by hand."
        )
    spared: set[str] = model.no_weight_decay()  # type: ignore[operator]
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in trained if n not in spared], "weight_decay": weight_decay},
        {"params": [p for n, p in trained if n in spared], "weight_decay": 0.0},
    ]


def warmup_cosine(step: int | Tensor, total_steps: int, warmup_steps: int = 10_000) -> float:
    """Return the multiplier of the rate at a step, counted from 0, where it is 0.

    Linear over the warm-up, times half a cosine from its end to the last step; in single precision
    throughout, as the authors' code has it.

    Raises:
        ValueError: the warm-up is as long as the training, or longer.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps} of {total_steps} steps; it must be shorter than the "
            "training."
        )
    s = torch.as_tensor(step, dtype=torch.float32)
    rise = (s / warmup_steps).clamp(max=1) if warmup_steps else torch.ones_like(s)
    done = ((s - warmup_steps) / (total_steps - warmup_steps)).clamp(0, 1)
    return float(rise * (0.5 * (1 + (torch.pi * done).cos())))


def mixup(x: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image mixed with the one before it in the batch, and labels likewise.

    Args:
        x: images ``[B, ...]``.
        labels: soft labels ``[B, num_classes]``.
        weights: of the image itself and of the other, ``[2]``; see :func:`mixup_weights`.

    Raises:
        ValueError: the weights are not two, or labels and images differ in number.
    """
    if weights.shape != (2,) or labels.dim() != 2 or len(labels) != len(x):
        raise ValueError(
            f"weights are {[*weights.shape]} and labels {[*labels.shape]} for {len(x)} images; "
            "give two weights, and a row of soft labels for each image."
        )
    own, other = weights.to(x).unbind()
    return own * x + other * x.roll(1, 0), own * labels + other * labels.roll(1, 0)


def mixup_weights(alpha: float = 0.2, generator: torch.Generator | None = None) -> Tensor:
    """Return the pair of weights of one batch: from Dirichlet(alpha, alpha), the larger first.

    Raises:
        ValueError: alpha is not positive.
    """
    if alpha <= 0:
        raise ValueError(f"alpha is {alpha}; give a positive number.")
    # Johnk's way, in logarithms: at a small alpha the powers are below single precision.
    while True:
        u, v = torch.rand(2, generator=generator, dtype=torch.float64).log() / alpha
        total = torch.logaddexp(u, v)
        if total <= 0:
            weights = torch.stack([u - total, v - total]).exp()
            return weights.sort(descending=True).values.float()
