"""The learners: what each predicts, and the gradient of its weights written out.

Tokens are [B, H, n, P]; weights [B, H, ...] with matrices as [in, out].
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from testtime.ops.mttt.gelu import gelu, times_slope
from testtime.ops.mttt.problem import Weights

# The gradient at the prediction, or a function from the prediction to it.
Error = Tensor | Callable[[Tensor], Tensor]


class Learner(Protocol):
    """A map from tokens to tokens of the same width, by weights of each image and head."""

    def predict(self, w: Weights, u: Tensor) -> Tensor:
        """Return f(u; w)."""
        ...


class Written(Learner, Protocol):
    """A learner whose weights' gradient is written out."""

    @property
    def column(self) -> tuple[int, ...]:
        """The dimensions over which an inner gradient is squashed."""
        ...

    def gradient(self, w: Weights, u: Tensor, error: Error) -> Weights:
        """Return the gradient of every weight, summed over the tokens."""
        ...


class Linear(NamedTuple):
    """f(u) = u W (+ b)."""

    column: tuple[int, ...] = (-2,)

    def predict(self, w: Weights, u: Tensor) -> Tensor:
        """Return f(u; w)."""
        return affine(u, w["weight"], w.get("bias"))

    def gradient(self, w: Weights, u: Tensor, error: Error) -> Weights:
        """Return the gradient of every weight, summed over the tokens."""
        e = error(self.predict(w, u)) if callable(error) else error
        return present(w, weight=u.mT @ e, bias=e.sum(-2))


class MLP(NamedTuple):
    """f(u) = gelu(u W1 (+ b1)) W2 (+ b2), GELU in its tanh form."""

    column: tuple[int, ...] = (-2,)

    def predict(self, w: Weights, u: Tensor) -> Tensor:
        """Return f(u; w)."""
        a = gelu(affine(u, w["weight_1"], w.get("bias_1")))
        return affine(a, w["weight_2"], w.get("bias_2"))

    def gradient(self, w: Weights, u: Tensor, error: Error) -> Weights:
        """Return the gradient of every weight, summed over the tokens."""
        p = affine(u, w["weight_1"], w.get("bias_1"))
        a = gelu(p)
        e = error(affine(a, w["weight_2"], w.get("bias_2"))) if callable(error) else error
        d = times_slope(e @ w["weight_2"].mT, p)
        return present(w, weight_1=u.mT @ d, bias_1=d.sum(-2), weight_2=a.mT @ e, bias_2=e.sum(-2))


class GLU(NamedTuple):
    """f(u) = (u W1) * silu(u W2): ViT^3's simplified SwiGLU."""

    column: tuple[int, ...] = (-2,)

    def predict(self, w: Weights, u: Tensor) -> Tensor:
        """Return f(u; w)."""
        return (u @ w["weight_1"]) * F.silu(u @ w["weight_2"])

    def gradient(self, w: Weights, u: Tensor, error: Error) -> Weights:
        """Return the gradient of every weight, summed over the tokens."""
        z1, z2 = u @ w["weight_1"], u @ w["weight_2"]
        gate = z2.sigmoid()
        silu = z2 * gate
        e = error(z1 * silu) if callable(error) else error
        slope = gate * (1 + z2 * (1 - gate))
        return {"weight_1": u.mT @ (e * silu), "weight_2": u.mT @ (e * z1 * slope)}


class DepthwiseConv(NamedTuple):
    """A 3 x 3 convolution of every channel over the grid of tokens, zeros outside.

    Nine shifted products: a convolution of B C groups is slow on some back ends.
    """

    grid: tuple[int, int]
    column: tuple[int, ...] = (-2, -1)

    def predict(self, w: Weights, u: Tensor) -> Tensor:
        """Return f(u; w)."""
        kernel = w["weight"].flatten(-2)[..., None, None]
        shifted = self._shifted(self._image(u))
        out = torch.stack([kernel[..., i, :, :] * x for i, x in enumerate(shifted)]).sum(0)
        return out.flatten(-2).mT

    def gradient(self, w: Weights, u: Tensor, error: Error) -> Weights:
        """Return the gradient of every weight, summed over the tokens."""
        e = self._image(error(self.predict(w, u)) if callable(error) else error)
        sums = [(x * e).sum((-2, -1)) for x in self._shifted(self._image(u))]
        return {"weight": torch.stack(sums, -1).view(*e.shape[:3], 3, 3)}

    def _image(self, u: Tensor) -> Tensor:
        return u.mT.reshape(*u.shape[:2], u.shape[3], *self.grid)

    def _shifted(self, image: Tensor) -> list[Tensor]:
        height, width = self.grid
        padded = F.pad(image, (1, 1, 1, 1))
        return [
            padded[..., row : row + height, column : column + width]
            for row in range(3)
            for column in range(3)
        ]


class Module(NamedTuple):
    """Any module on [n, P] tokens, with its parameters stacked; its gradient is automatic."""

    module: nn.Module

    def predict(self, w: Weights, u: Tensor) -> Tensor:
        """Return f(u; w)."""

        def one(weights: Weights, tokens: Tensor) -> Tensor:
            out: Tensor = functional_call(self.module, weights, (tokens,))
            return out

        out: Tensor = vmap(vmap(one))(w, u)
        if out.shape != u.shape:
            raise ValueError(
                f"The learner makes tokens of shape {[*out.shape[2:]]} from {[*u.shape[2:]]}; it "
                "must keep their number and width, for its answers are the operator's."
            )
        return out


# What the weights of each learner are called; a bias may be left out.
NAMES = {
    "linear": ("weight", "bias"),
    "mlp": ("weight_1", "bias_1", "weight_2", "bias_2"),
    "glu": ("weight_1", "weight_2"),
    "dwconv": ("weight",),
}


def affine(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return u W (+ b)."""
    out = u @ weight
    return out if bias is None else out + bias.unsqueeze(-2)


def present(w: Weights, **grads: Tensor) -> Weights:
    """Return the gradients of those weights that the learner has."""
    return {name: grads[name] for name in w}
