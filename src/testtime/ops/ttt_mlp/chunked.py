"""TTT-MLP a chunk at a time: the dual form, and its backward by hand.

Source: arXiv 2407.04620, section 2.5 and appendix A.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from testtime.ops.ttt.affine import Outer, add_product, moved, moved_backward, product
from testtime.ops.ttt.chunks import Cotangents, Tokens, Tracked
from testtime.ops.ttt.norm import Descent, DescentBackward, Norm, descend, normalise
from testtime.ops.ttt_mlp.gelu import EXACT, OFFICIAL, curvature, gelu, through


class Saved(NamedTuple):
    """What the backward needs of the inner forward and backward pass."""

    z1: Tensor
    descent: Descent
    back: Tensor  # cotangent of gelu(z1)


class MLP:
    """f(x) = LN(gelu(x W1 + b1) W2 + b2), learned as by ``Linear``; parameters (W1, b1, W2, b2)."""

    def __init__(self, norm: Norm, operand: torch.dtype, official: bool = False) -> None:
        self.norm, self.operand = norm, operand
        self.constants = OFFICIAL if official else EXACT

    def learn(self, start: Sequence[Tensor], k: Tensor, v: Tensor) -> Tracked[Saved]:
        """Return the gradients that each token gives at the chunk's start, for both layers."""
        w1, b1, w2, b2 = start
        z1 = product(k, w1, self.operand) + b1
        x2 = gelu(z1)
        descent = descend(product(x2, w2, self.operand) + b2, v - k, self.norm)
        back = product(descent.g, w2.mT, self.operand)
        g1 = through(back, z1, self.constants)
        return Tracked((k, x2), (g1, descent.g), descent.loss, Saved(z1, descent, back))

    def answer(
        self,
        start: Sequence[Tensor],
        q: Tensor,
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        steps: Tensor,
    ) -> Tensor:
        """Return q + f(q) of each token, with the parameters that it reads."""
        (w1, b1, w2, b2), (k, x2), (g1, g2) = start, inputs, gradients
        x2_read = gelu(moved(q, w1, b1, k, g1, steps, self.operand))
        z2 = moved(x2_read, w2, b2, x2, g2, steps, self.operand)
        return q + torch.addcmul(self.norm.bias, self.norm.weight, normalise(z2, self.norm.eps).hat)

    def backward(
        self,
        start: Sequence[Tensor],
        learned: Tracked[Saved],
        tokens: Tokens,
        steps: Tensor,
        rate: Tensor,
        d_o: Tensor,
        d_state: Sequence[Tensor],
    ) -> Cotangents:
        """Go through a group of chunks from its end; see ``chunks.backward`` for the arguments."""
        norm, operand = self.norm, self.operand
        w1, b1, w2, b2 = start
        q, k = tokens.q, tokens.k
        (_, x2), (g1, g2), _, (z1, descent, back) = learned

        # o = q + LN(z2): the read-out, of all chunks at once.
        z1_read = moved(q, w1, b1, k, g1, steps, operand)
        x2_read = gelu(z1_read)
        out = normalise(moved(x2_read, w2, b2, x2, g2, steps, operand), norm.eps)
        u2 = out.pull(norm.weight * d_o)
        read2 = moved_backward(x2_read, w2, x2, g2, steps, operand, u2)
        u1 = through(read2.x, z1_read)
        read1 = moved_backward(q, w1, k, g1, steps, operand, u1)

        # W' = W - rate x^T g and the gradients themselves: one chunk after another.
        bend = back * curvature(z1, self.constants)
        d_w1, d_b1, d_w2, d_b2 = d_state
        d_z1, reach1 = torch.empty_like(z1), torch.empty_like(z1)
        d_along, reach2 = torch.empty_like(g2), torch.empty_like(g2)
        outer1 = Outer((q, k), (u1, d_z1), d_w1, d_b1, biased=2, operand=operand)
        # back = g2 W2^T is a product with W2 the other way round, and knows no bias.
        known2 = (x2_read, x2, torch.empty_like(x2)), (u2, d_along, g2)
        outer2 = Outer(*known2, d_w2, d_b2, biased=2, operand=operand)
        through_descent = DescentBackward(descent, norm)
        for j in reversed(range(len(z1))):
            k_j, x2_j, z1_j, g2_j, rate_j, w2_j = k[j], x2[j], z1[j], g2[j], rate[j], w2[j]
            add_product(d_b1[j + 1], k_j, d_w1[j + 1], operand, out=reach1[j])
            add_product(d_b2[j + 1], x2_j, d_w2[j + 1], operand, out=reach2[j])
            d_g1 = read1.g[j].addcmul_(rate_j, reach1[j], value=-1)
            d_g2 = read2.g[j].addcmul_(rate_j, reach2[j], value=-1)
            d_x2 = add_product(read2.inputs[j], -rate_j * g2_j, d_w2[j + 1].mT, operand)
            # g1 = back * slope(z1), back = g2 W2^T
            d_back = through(d_g1, z1_j, self.constants)
            d_g2 = add_product(d_g2, d_back, w2_j, operand)
            d_z2, d_along[j] = through_descent(j, d_g2)
            # z2 = x2 W2 + b2, x2 = gelu(z1), z1 = k W1 + b1
            d_x2 = add_product(d_x2, d_z2, w2_j.mT, operand)
            d_z1[j] = torch.addcmul(through(d_x2, z1_j), d_g1, bend[j])
            outer1.put(j, 1, y=d_z1[j])
            outer2.put(j, 1, y=d_z2)
            outer2.put(j, 2, x=d_back)
            outer1.close(j)
            outer2.close(j)

        d_error = norm.weight * d_along
        d_k = read1.inputs + product(d_z1, w1.mT, operand) + d_error
        d_k -= rate * product(g1, d_w1[1:].mT, operand)
        d_rate = (g1 * reach1).sum(-1, keepdim=True) + (g2 * reach2).sum(-1, keepdim=True)
        return Cotangents(
            q=d_o + read1.x,
            k=d_k,
            v=-d_error,
            steps=read1.steps + read2.steps,
            rate=-d_rate,
            weight=d_o * out.hat + d_along * descent.error + d_error * descent.at.hat,
            bias=d_o + d_error,
        )
