"""The MTTT layer."""

import math
import re
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from testtime.layers.attention import check_heads, merge_heads, split_heads
from testtime.layers.official import Official, into_heads, out_of_heads, row, same, split
from testtime.layers.record import Inner, Recorded
from testtime.ops.mttt import Decoder, mttt, random_order
from testtime.ops.mttt.checks import check_steps


class MTTT(Recorded):
    """Mixing by a learner that is fitted to the tokens: ``[B, N, C] -> [B, N, C]``.

    Each head projects the tokens to what its learner is shown (phi, the key) and asked (psi, the
    query). From first weights W0 the learner takes gradient steps on reconstructing each token
    through a decoder (g); its answers to the queries are projected (h) and summed over the heads.

    >>> y = MTTT(192, 3)(torch.randn(8, 196, 192))

    Args:
        dim: C.
        num_heads: H; the width of a head is C / H.
        learner: ``"linear"``, ``"mlp"``, or a module from ``[n, C / H]`` to the same, whose weights
            each head starts from.
        steps: T, inner steps; 0 leaves the learner at W0.
        inner_lr: one rate, or one a step.
        learn_inner_lr: whether the rates are parameters ``[T, H]``.
        sgd: whether each step takes a block of the tokens, in an order that is drawn for each head
            at every training forward and fixed by ``seed`` in eval mode.
        w0: ``"learned"``, ``"fixed"`` at its initial draw, or ``"zero"`` and fixed.
        learner_bias: whether the built-in learners have biases.
        decoder_norm: whether the decoder ends in a LayerNorm.
        hidden_ratio: hidden width of the mlp learner, in widths of a head.
        max_steps: take no more steps, of blocks still cut for ``steps``; the authors' code stops
            at 4 without a word.
        form: see :func:`testtime.ops.mttt.chosen_form`.
        seed: of the orders in eval mode.

    Raises:
        ValueError: heads that do not divide the width, negative steps, an unknown learner or W0.

    Source: Sun et al., "Learning to (learn at test time)", arXiv 2310.13807, section 2. Initial
    values, loss scale, GELU and eps are those of the authors' code.
    """

    inner_lr: nn.Parameter | tuple[float, ...]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        learner: str | nn.Module = "mlp",
        steps: int = 1,
        inner_lr: float | Sequence[float] = 1.0,
        learn_inner_lr: bool = False,
        sgd: bool = False,
        w0: str = "learned",
        learner_bias: bool = True,
        decoder_norm: bool = True,
        hidden_ratio: int = 4,
        max_steps: int | None = None,
        differentiate: bool = True,
        form: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_steps(steps, max_steps, steps, sgd)
        if w0 not in ("learned", "fixed", "zero"):
            raise ValueError(f"w0 is '{w0}'; choose 'learned', 'fixed' or 'zero'.")
        if w0 == "zero" and decoder_norm and steps:
            warnings.warn(
                "W0 = 0 under a decoder with LayerNorm: the LayerNorm sees an exact zero, and its "
                "slope there, 1000, throws the learner far off. Use w0='learned', or "
                "decoder_norm=False.",
                stacklevel=2,
            )
        self.dim, self.num_heads, self.steps, self.max_steps = dim, num_heads, steps, max_steps
        self.sgd, self.w0, self.differentiate = sgd, w0, differentiate
        self.hidden_ratio, self.form, self.seed = hidden_ratio, form, seed
        width = dim // num_heads
        self.phi, self.psi, self.h = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.g = _Decoder(num_heads, width, dim, decoder_norm)
        self.inner = nn.ParameterDict(_first_weights(learner, num_heads, width, hidden_ratio))
        if not learner_bias and isinstance(learner, str):
            for name in [n for n in self.inner if n.startswith("bias")]:
                del self.inner[name]
        # In a list, so that the module's own weights are no parameters: `inner` has them.
        self._learner = [learner]
        rates = [inner_lr] if isinstance(inner_lr, int | float) else [*inner_lr]
        if not 1 <= len(rates) <= max(steps, 1):
            raise ValueError(
                f"inner_lr has {len(rates)} rates for {steps} steps; give one for all, or at "
                "most one a step (the last is repeated)."
            )
        if learn_inner_lr:
            rates += rates[-1:] * (max(steps, 1) - len(rates))
            self.inner_lr = nn.Parameter(torch.tensor(rates)[:, None].repeat(1, num_heads))
        else:
            self.inner_lr = tuple(rates)
        self.reset_parameters()

    @property
    def learner(self) -> str | nn.Module:
        """The learner, by name or as a module."""
        return self._learner[0]

    def reset_parameters(self) -> None:
        """Draw the official initial values; rates and a module's weights stay."""
        bound = math.sqrt(3 / self.dim)
        for layer in (self.phi, self.psi, self.h):
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
        nn.init.uniform_(self.g.weight, -bound, bound)
        nn.init.zeros_(self.g.bias)
        for name, w in self.inner.items():
            if self.w0 == "zero" or name.startswith("bias"):
                nn.init.zeros_(w)
            elif isinstance(self.learner, str):
                bound = math.sqrt(6 / (w.shape[-2] + w.shape[-1]))
                nn.init.uniform_(w, -bound, bound)
            w.requires_grad_(self.w0 == "learned")

    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, order: Tensor | None = None
    ) -> Tensor:
        """Mix tokens ``[B, N, C]``.

        Args:
            x: tokens, normed by the block that hosts the layer.
            key_padding_mask: ``[B, N]``, true at padded tokens, from which nothing is learned.
            order: ``[N]`` or ``[H, N]``, in place of a drawn one, where ``sgd`` is on.
        """
        if order is None and self.sgd and self.steps:
            order = self._order(x)
        recording = self.inner_record is not None
        o, losses, state = mttt(
            split_heads(self.psi(x), self.num_heads),
            split_heads(self.phi(x), self.num_heads),
            x,
            {name.replace("/", "."): w for name, w in self.inner.items()},
            self.g(),
            learner=self.learner,
            steps=self.steps,
            max_steps=self.max_steps,
            inner_lr=self.inner_lr,
            order=order,
            key_padding_mask=key_padding_mask,
            differentiate=self.differentiate,
            losses=recording,
            state=self.inner_state,
            form=self.form,
        )
        if self.inner_record is not None and losses is not None:
            self.inner_record.append(Inner(losses, state))
        y: Tensor = self.h(merge_heads(o))
        return y + self._nothing() if not self.taken or not self.differentiate else y

    @property
    def taken(self) -> int:
        """How many steps are taken."""
        return self.steps if self.max_steps is None else min(self.steps, self.max_steps)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the official recipe does not decay: all but kernels."""
        last = {n: re.split("[./]", n)[-1] for n, _ in self.named_parameters()}
        return {n for n, part in last.items() if not part.startswith("weight")}

    def flops(self, tokens: int) -> int:
        """Return a forward's FLOPs for one image by the formulas of the authors' count.

        A multiply and an add are two; projections are in, entry-wise work and losses are not.
        """
        d, p = self.dim, self.dim // self.num_heads
        if self.learner == "linear":
            ask, learn = 2, 2
        elif self.learner == "mlp":
            ask, learn = 4 * self.hidden_ratio, 6 * self.hidden_ratio
        else:
            raise TypeError(
                "The FLOPs of a module are not known; count those of a built-in learner."
            )
        passes = min(self.taken, 1) if self.sgd else self.taken
        if not passes:
            return 4 * tokens * d * d + ask * tokens * d * p
        step = 4 * tokens * d * d + (ask + learn) * tokens * d * p
        return 6 * tokens * d * d + ask * tokens * d * p + passes * step

    def official(self) -> dict[str, Official]:
        """Return the official names of the parameters."""
        heads = self.num_heads
        names = {
            "phi/kernel": into_heads("phi.weight", heads),
            "phi/bias": split("phi.bias", heads),
            "psi/kernel": into_heads("psi.weight", heads),
            "psi/bias": split("psi.bias", heads),
            "g/kernel": same("g.weight"),
            "g_bias": row("g.bias"),
            "h/kernel": out_of_heads("h.weight", heads),
            "h_bias": row("h.bias"),
        }
        if self.g.scale is not None:
            names |= {"decoder_LN/scale": same("g.scale"), "decoder_LN/bias": same("g.shift")}
        for name in self.inner:
            kind, _, number = name.partition("_")
            layer = int(number or 1) - 1
            part = "kernel" if kind == "weight" else "bias"
            names[f"inner_Dense_{layer}/{part}"] = same(f"inner.{name}")
        return names

    def extra_repr(self) -> str:
        """Show what is chosen."""
        name = self.learner if isinstance(self.learner, str) else type(self.learner).__name__
        return (
            f"{self.dim}, {self.num_heads}, learner={name}, steps={self.steps}, sgd={self.sgd}, "
            f"w0={self.w0}, form={self.form}"
        )

    def _order(self, x: Tensor) -> Tensor:
        if self.training:
            return random_order(self.num_heads, x.shape[1], device=x.device)
        order: Tensor = _seeded_order(self.num_heads, x.shape[1], self.seed)
        return order.to(x.device)

    def _nothing(self) -> Tensor:
        """Return a zero of which the parameters that the answer does not know are a part."""
        unknown = [*self.phi.parameters(), *self.g.parameters(), *self.parameters(recurse=False)]
        return torch.stack([p.flatten()[:0].sum() for p in unknown]).sum()


class _Decoder(nn.Module):
    """The parameters of the reconstruction."""

    scale: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(self, heads: int, width: int, dim: int, norm: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width, dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.scale = nn.Parameter(torch.ones(heads, dim)) if norm else None
        self.shift = nn.Parameter(torch.zeros(heads, dim)) if norm else None

    def forward(self) -> Decoder:
        return Decoder(self.weight, self.bias, self.scale, self.shift)


def _first_weights(
    learner: str | nn.Module, heads: int, width: int, ratio: int
) -> dict[str, nn.Parameter]:
    if isinstance(learner, nn.Module):
        own = learner.named_parameters()
        # A slash, for a parameter's name may have no dot.
        return {
            n.replace(".", "/"): nn.Parameter(w.detach().expand(heads, *w.shape).clone())
            for n, w in own
        }
    hidden = ratio * width
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "linear": {"weight": (width, width), "bias": (width,)},
        "mlp": {
            "weight_1": (width, hidden),
            "bias_1": (hidden,),
            "weight_2": (hidden, width),
            "bias_2": (width,),
        },
    }
    if learner not in shapes:
        raise ValueError(
            f"There is no learner '{learner}' for this layer (known: {', '.join(shapes)}, or a "
            "module); ViT^3's are in layers.ViTTT."
        )
    return {n: nn.Parameter(torch.zeros(heads, *s)) for n, s in shapes[learner].items()}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _seeded_order(heads: int, tokens: int, seed: int) -> Tensor:
    return random_order(heads, tokens, torch.Generator().manual_seed(seed))
