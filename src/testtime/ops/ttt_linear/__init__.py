"""TTT-Linear: a sequence layer whose state is a linear model trained as it reads."""

from collections.abc import Sequence

from torch import Tensor

from testtime.ops.ttt.chunks import Tokens
from testtime.ops.ttt.library import register
from testtime.ops.ttt.run import Form, Model, Options, Output, run
from testtime.ops.ttt.state import State
from testtime.ops.ttt_linear.chunked import Linear

_MODEL = Model(Linear, register("ttt_linear", Linear), 1)


def ttt_linear(
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
    form: Form = "auto",
) -> Output:
    """Read tokens with TTT-Linear, f(x) = LN(x W + b): from q, k, v to outputs and a state.

    In a chunk of K tokens that starts with parameters S, token j gives g_j, the gradient at S of
    1/2 ||f(k_j) - (v_j - k_j)||^2. Token i reads S_i = S - c_i sum_{j<=i} lr_j g_j and is answered
    o_i = q_i + f(q_i; S_i); the next chunk starts from S_K. Any split of a sequence into calls that
    hand over the state equals one call, gradients included.

    State and normalisation are float32 (float64 for float64 tokens); with bfloat16 or float16
    tokens products have operands of that dtype and are summed up in float32, on a CPU too. A token
    that is not finite spoils its own row from its chunk on, and no other. A length of 0 changes
    nothing.

    Args:
        q: queries, [B, H, T, D].
        k: keys, of one dtype and shape with q.
        v: values, likewise.
        lr: inner learning rate of each token, [B, H, T], already divided by D.
        coefficient: c by position in the chunk, [K], about 1 / i; its length is the chunk's.
        norm_weight: of the inner LayerNorm, [H, D].
        norm_bias: likewise.
        state: what to go on from: a ``State``, or the start parameters W [H, D, D], b [H, 1, D],
            shared by all rows or with a batch in front.
        lengths: how many of the T tokens of each row are real, [B]; those come first.
        cu_seqlens: boundaries of sequences that lie one behind the other in one row, [N + 1]. Each
            has its own chunks and, in order, its own row of the state.
        remember: how many tokens ``state.roll_back`` may take back, asked for at the start.
        eps: of the inner LayerNorm.
        recompute: the parameters at the start of every so many chunks are kept for the backward,
            those between are computed again; 1 keeps all.
        losses: return the inner losses as well.
        form: "chunked" is for many tokens; "decode" reads one token a row and reads the parameters
            once; "auto" decodes single tokens that need no gradient.

    Raises:
        ValueError: arguments that do not fit together.

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
        options=Options(eps, recompute=recompute, losses=losses),
    )
