"""TTT-MLP: a sequence layer whose state is a two-layer perceptron trained as it reads."""

from collections.abc import Sequence

from torch import Tensor

from testtime.ops.ttt.chunks import Tokens
from testtime.ops.ttt.library import register
from testtime.ops.ttt.run import Form, Model, Options, Output, run
from testtime.ops.ttt.state import State
from testtime.ops.ttt_mlp.chunked import MLP

_MODEL = Model(MLP, register("ttt_mlp", MLP), 2)


def ttt_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    coefficient: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    state: State | Sequence[Tensor],
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    remember: int = 0,
    eps: float = 1e-6,
    recompute: int = 16,
    losses: bool = False,
    official: bool = False,
    form: Form = "auto",
) -> Output:
    """Read tokens with TTT-MLP, f(x) = LN(gelu(x W1 + b1) W2 + b2): to outputs and a state.

    All is as in ``ttt_linear``, but the parameters: W1 [H, D, F], b1 [H, 1, F], W2 [H, F, D] and
    b2 [H, 1, D], with any F (the paper has 4 D). ``official`` takes the constants of the authors'
    inner derivative, which are rounded to eight digits, in the place of the exact ones.

    Source: Sun et al., arXiv 2407.04620, equations 2 to 6 and section 2.5.
    """
    return run(
        _MODEL,
        Tokens(q, k, v, lr[..., None]),
        coefficient,
        (norm_weight, norm_bias),
        state,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        remember=remember,
        form=form,
        options=Options(eps, official, recompute=recompute, losses=losses),
    )
