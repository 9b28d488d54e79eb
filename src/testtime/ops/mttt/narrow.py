"""E, the gradient at the prediction, from P numbers a token in place of D, and back.

With V = m G + g_b the decoded prediction and Z the gradient there, E = Z G^T. Neither V nor Z, D
numbers a token and head, is made: what E needs of them are products of G with itself and with x.

``Plain`` is a decoder without LayerNorm, ``Normed`` one with it. Each has per-head constants made
from the decoder, the token's values v [B, H, n, P] and t [B, H, n, 1], ``error`` from predictions m
to E, and ``backward`` from the gradient of E to E once more and the gradients of m, v, t and of the
constants, the last summed over images and tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from testtime.ops.mttt.objectives import Decoder

Sums = dict[str, Tensor]
Back = tuple[Tensor, Tensor, Tensor, Tensor, Sums]


class Plain(NamedTuple):
    """E = m S + e - v with S = G G^T, e = G g_b, v = G x."""

    decoder: Decoder
    square: Tensor  # S, [H, P, P]
    offset: Tensor  # e, [H, 1, P]

    @classmethod
    def of(cls, decoder: Decoder) -> "Plain":
        """Return the constants of a decoder."""
        g = decoder.weight
        return cls(decoder, g @ g.mT, (g @ decoder.bias).unsqueeze(-2))

    def values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return v and g_b . x of tokens [B, N, D]."""
        return project(x, self.decoder.weight), (x @ self.decoder.bias)[:, None, :, None]

    def error(self, m: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return E."""
        return m @ self.square + self.offset - v

    def square_error(self, m: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return |R|^2 - |x|^2 of every token, [B, H, n, 1]."""
        bias = self.decoder.bias
        along = dot(m, m @ self.square + 2 * (self.offset - v))
        return along + bias @ bias - 2 * t

    def backward(self, m: Tensor, v: Tensor, t: Tensor, e_: Tensor) -> Back:
        """Return E and, from its gradient, those of m, v, t (none), S and e."""
        sums = {"square": over_images(m, e_), "offset": e_.sum((0, 2))}
        return self.error(m, v, t), e_ @ self.square, -e_, torch.zeros_like(t), sums

    def finish(self, x: Tensor, v_: Tensor, t_: Tensor, sums: Sums) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, G, g_b and of no LayerNorm."""
        g = self.decoder.weight
        s_, e_ = sums["square"], sums["offset"]
        g_ = (s_ + s_.mT) @ g + e_[..., None] * self.decoder.bias + onto(v_, x)
        return unproject(v_, g), g_, (e_[..., None] * g).sum((0, 1)), None, None


class Normed(NamedTuple):
    """E = (q - kappa r) / S, S the deviation of V, from products of the centred G and g_b.

    With a = m K + k1, r = m C + c: S^2 = m.(r + c) + c0 + eps, q = a / S + s1 - v,
    kappa = (z / S + w) / S^2, z = m.(a + k1) + k0, w = m.(s1 - v) + s0 - t.
    """

    decoder: Decoder
    g0: Tensor  # rows of G, centred: [H, P, D]
    b0: Tensor  # g_b, centred: [D]
    scale: Tensor  # gamma, [H, D]
    shift: Tensor  # beta, [H, D]
    cov: Tensor  # G0 G0^T / D, [H, P, P]
    cross: Tensor  # G0 b0 / D, [H, 1, P]
    var: Tensor  # b0 . b0 / D + eps
    k2: Tensor  # G0 gamma^2 G0^T, [H, P, P]
    k1: Tensor  # G0 gamma^2 b0, [H, 1, P]
    k0: Tensor  # b0 gamma^2 b0, [H, 1, 1]
    s1: Tensor  # G0 gamma beta, [H, 1, P]
    s0: Tensor  # gamma beta . b0, [H, 1, 1]

    @classmethod
    def of(cls, decoder: Decoder) -> "Normed":
        """Return the constants of a decoder."""
        scale, shift = decoder.scale, decoder.shift
        assert scale is not None
        assert shift is not None
        g0 = decoder.weight - decoder.weight.mean(-1, keepdim=True)
        b0 = decoder.bias - decoder.bias.mean()
        square, both, d = scale.square(), scale * shift, b0.shape[0]
        return cls(
            *(decoder, g0, b0, scale, shift),
            cov=g0 @ g0.mT / d,
            cross=(g0 @ b0 / d).unsqueeze(-2),
            var=b0 @ b0 / d + decoder.eps,
            k2=(g0 * square[:, None]) @ g0.mT,
            k1=(square * b0)[:, None] @ g0.mT,
            k0=(square @ b0.square())[:, None, None],
            s1=both[:, None] @ g0.mT,
            s0=(both @ b0)[:, None, None],
        )

    def values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return v = x (G0 gamma)^T and t = x . (gamma b0) of tokens [B, N, D]."""
        t = x @ (self.scale * self.b0).mT
        return project(x, self.g0 * self.scale[:, None]), t.mT[..., None]

    def _parts(self, m: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        a, r = m @ self.k2 + self.k1, m @ self.cov + self.cross
        s = (dot(m, r + self.cross) + self.var).sqrt()
        z = dot(m, a + self.k1) + self.k0
        w = dot(m, self.s1 - v) + self.s0 - t
        return a, r, s, z, w

    def error(self, m: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return E."""
        a, r, s, z, w = self._parts(m, v, t)
        return (a / s + self.s1 - v - (z / s + w) / s.square() * r) / s

    def square_error(self, m: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return |R|^2 - |beta - x|^2 of every token, [B, H, n, 1]."""
        _, _, s, z, w = self._parts(m, v, t)
        return z / s.square() + 2 * w / s

    def backward(self, m: Tensor, v: Tensor, t: Tensor, e_: Tensor) -> Back:
        """Return E and, from its gradient, those of m, v, t and of the constants."""
        a, r, s, z, w = self._parts(m, v, t)
        lean = self.s1 - v
        kappa = (z / s + w) / s.square()
        e = (a / s + lean - kappa * r) / s
        q_ = e_ / s
        kappa_ = -dot(q_, r)
        z_, w_ = kappa_ / s**3, kappa_ / s.square()
        s_ = -dot(q_, e) - kappa_ * (3 * z / s + 2 * w) / s**3 - dot(q_, a) / s.square()
        omega = s_ / (2 * s)
        a_ = q_ / s + z_ * m
        r_ = omega * m - kappa * q_
        m_ = z_ * (a + self.k1) + w_ * lean + omega * (r + self.cross)
        m_ = m_ + r_ @ self.cov + a_ @ self.k2
        sums = {
            "k2": over_images(m, a_),
            "k1": (a_ + z_ * m).sum((0, 2)),
            "k0": z_.sum((0, 2)),
            "s1": (q_ + w_ * m).sum((0, 2)),
            "s0": w_.sum((0, 2)),
            "cov": over_images(m, r_),
            "cross": (r_ + omega * m).sum((0, 2)),
            "var": omega.sum((0, 2)),
        }
        return e, m_, -q_ - w_ * m, -w_, sums

    def finish(self, x: Tensor, v_: Tensor, t_: Tensor, sums: Sums) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, G, g_b, gamma and beta."""
        g0, b0, scale, shift = self.g0, self.b0, self.scale, self.shift
        square, both, d = scale.square(), scale * shift, b0.shape[0]
        k2_, cov_ = sums["k2"], sums["cov"]
        on_x = onto(v_, x)  # [H, P, D]
        t_on_x = onto(t_, x)[:, 0]  # [H, D]

        def along(name: str) -> Tensor:  # [H, D]
            return (sums[name][..., None] * g0).sum(1)

        def outer(name: str, row: Tensor) -> Tensor:  # [H, P, D]
            return sums[name][..., None] * row.unsqueeze(-2)

        g0_ = (cov_ + cov_.mT) @ g0 / d + outer("cross", b0 / d)
        g0_ = g0_ + (k2_ + k2_.mT) @ g0 * square[:, None] + outer("k1", square * b0)
        g0_ = g0_ + outer("s1", both) + on_x * scale[:, None]
        b0_ = (along("cross") + 2 * sums["var"] * b0) / d + square * along("k1")
        b0_ = (b0_ + 2 * sums["k0"] * square * b0 + sums["s0"] * both + t_on_x * scale).sum(0)
        slope = along("s1") + sums["s0"] * b0
        inside = (g0 * (k2_ @ g0)).sum(1) + along("k1") * b0 + sums["k0"] * b0.square()
        scale_ = 2 * scale * inside + shift * slope + (on_x * g0).sum(1) + t_on_x * b0
        x_ = unproject(v_, g0 * scale[:, None]) + unproject(t_, (scale * b0)[:, None])
        return (
            x_,
            g0_ - g0_.mean(-1, keepdim=True),
            b0_ - b0_.mean(),
            scale_,
            scale * slope,
        )


Narrow = Plain | Normed


def narrow(decoder: Decoder) -> Narrow:
    """Return the narrow form of a decoder."""
    return Plain.of(decoder) if decoder.scale is None else Normed.of(decoder)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of every token, [..., 1]."""
    return (a * b).sum(-1, keepdim=True)


def over_images(a: Tensor, b: Tensor) -> Tensor:
    """Return a^T b of every head, summed over images: [H, P, Q] from [B, H, n, P] and [.., Q]."""
    return (a.mT @ b).sum(0)


# One product for all heads in the three that follow, so that no token is repeated for each.


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Return x weight^T for every head: [B, H, N, P] from [B, N, D] and [H, P, D]."""
    out = x @ weight.flatten(0, 1).mT
    return out.view(*x.shape[:2], *weight.shape[:2]).transpose(1, 2)


def unproject(v: Tensor, weight: Tensor) -> Tensor:
    """Return v weight summed over heads: [B, N, D] from [B, H, N, P] and [H, P, D]."""
    return v.transpose(1, 2).flatten(2) @ weight.flatten(0, 1)


def onto(v: Tensor, x: Tensor) -> Tensor:
    """Return v^T x of every head, summed over images: [H, P, D] from [B, H, N, P], [B, N, D]."""
    heads, width = v.shape[1], v.shape[3]
    flat = v.transpose(1, 2).reshape(-1, heads * width).mT @ x.reshape(-1, x.shape[-1])
    return flat.view(heads, width, -1)
