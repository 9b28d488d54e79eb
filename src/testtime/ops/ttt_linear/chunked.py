"""TTT-Linear a chunk at a time: the dual form, and its backward by hand.

Source: arXiv 2407.04620, section 2.5 and appendix A.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from testtime.ops.ttt.affine import Outer, add_product, moved, moved_backward, product
from testtime.ops.ttt.chunks import Cotangents, Tokens, Tracked
from testtime.ops.ttt.norm import Descent, DescentBackward, Norm, descend, normalise


class Linear:
    """f(x) = LN(x W + b), learned from pairs of k and v - k; parameters (W, b)."""

    def __init__(self, norm: Norm, operand: torch.dtype, official: bool = False) -> None:
        self.norm, self.operand = norm, operand

    def learn(self, start: Sequence[Tensor], k: Tensor, v: Tensor) -> Tracked[Descent]:
        """Return the gradient that each token gives at the chunk's start."""
        w, b = start
        descent = descend(product(k, w, self.operand) + b, v - k, self.norm)
        return Tracked((k,), (descent.g,), descent.loss, descent)

    def answer(
        self,
        start: Sequence[Tensor],
        q: Tensor,
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        steps: Tensor,
    ) -> Tensor:
        """Return q + f(q) of each token, with the parameters that it reads."""
        (w, b), (k,), (g,) = start, inputs, gradients
        z = moved(q, w, b, k, g, steps, self.operand)
        return q + torch.addcmul(self.norm.bias, self.norm.weight, normalise(z, self.norm.eps).hat)

    def backward(
        self,
        start: Sequence[Tensor],
        learned: Tracked[Descent],
        tokens: Tokens,
        steps: Tensor,
        rate: Tensor,
        d_o: Tensor,
        d_state: Sequence[Tensor],
    ) -> Cotangents:
        """Go through a group of chunks from its end; see ``chunks.backward`` for the arguments."""
        norm, operand = self.norm, self.operand
        w, b = start
        q, k = tokens.q, tokens.k
        descent = learned.saved
        at, error, g = descent

        # o = q + LN(z): the read-out, of all chunks at once.
        out = normalise(moved(q, w, b, k, g, steps, operand), norm.eps)
        u = out.pull(norm.weight * d_o)
        read = moved_backward(q, w, k, g, steps, operand, u)

        # W' = W - rate k^T g and the gradient itself: one chunk after another.
        d_w, d_b = d_state
        d_z, d_along, reach = (torch.empty_like(g) for _ in range(3))
        outer = Outer((q, k), (u, d_z), d_w, d_b, biased=2, operand=operand)
        through_descent = DescentBackward(descent, norm)
        for j in reversed(range(len(g))):
            add_product(d_b[j + 1], k[j], d_w[j + 1], operand, out=reach[j])
            d_g = read.g[j].addcmul_(rate[j], reach[j], value=-1)
            d_z[j], d_along[j] = through_descent(j, d_g)
            outer.put(j, 1, y=d_z[j])
            outer.close(j)

        d_error = norm.weight * d_along
        d_k = read.inputs + product(d_z, w.mT, operand) + d_error
        d_k -= rate * product(g, d_w[1:].mT, operand)
        return Cotangents(
            q=d_o + read.x,
            k=d_k,
            v=-d_error,
            steps=read.steps,
            rate=-(g * reach).sum(-1, keepdim=True),
            weight=d_o * out.hat + d_along * error + d_error * at.hat,
            bias=d_o + d_error,
        )
