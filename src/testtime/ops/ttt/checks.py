"""What an operator refuses, before anything is computed."""

from collections.abc import Sequence

from torch import Tensor

from testtime.ops.ttt.chunks import Tokens
from testtime.ops.ttt.state import State

FORMS = ("auto", "chunked", "decode")


_PARAMETERS = {
    1: "W [heads, D, D] and b [heads, 1, D]",
    2: "W1 [heads, D, F], b1 [heads, 1, F], W2 [heads, F, D] and b2 [heads, 1, D]",
}


def check(
    layers: int,
    tokens: Tokens,
    coefficient: Tensor,
    norm: tuple[Tensor, Tensor],
    state: State | Sequence[Tensor],
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    remember: int,
    form: str,
    recompute: int,
) -> None:
    """Refuse arguments that do not fit together; values are not looked at.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a number is out of its range.
    """
    q, k, v, lr = tokens
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "q, k and v must be [batch, heads, length, head_dim], all alike; "
            f"found {_shapes(q, k, v)}."
        )
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k and v must have one floating dtype; found {q.dtype}, {k.dtype}, {v.dtype}."
        )
    batch, heads, length, dim = q.shape
    if lr.shape != (batch, heads, length, 1):
        raise ValueError(
            f"lr must be [batch, heads, length], a rate for each token of q {_shapes(q)}; "
            f"found {_shapes(lr[..., 0])}."
        )
    if coefficient.dim() != 1 or not len(coefficient):
        raise ValueError(
            f"The position coefficient must be [chunk] with a chunk of 1 token or more; found "
            f"{_shapes(coefficient)}. Give, for example, 1 / torch.arange(1, 17)."
        )
    if any(t.shape != (heads, dim) for t in norm):
        raise ValueError(
            f"The inner norm's weight and bias must be [heads, head_dim], here [{heads}, {dim}]; "
            f"found {_shapes(*norm)}."
        )
    if form not in FORMS or recompute < 1 or remember < 0:
        raise ValueError(
            f"form is one of {', '.join(FORMS)}, recompute at least 1 and remember at least 0; "
            f"found form={form!r}, recompute={recompute}, remember={remember}."
        )
    if form == "decode" and length != 1:
        raise ValueError(f"form='decode' reads one token a row, found {length}; use form='auto'.")
    rows = batch
    if cu_seqlens is not None:
        rows = _check_packed(cu_seqlens, batch, length, lengths)
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths must be [batch], here [{batch}]; found {_shapes(lengths)}.")
    if isinstance(state, State):
        _check_state(layers, state, (rows, heads, dim), coefficient, q, remember)
    else:
        _check_start(layers, state, rows, heads, dim, q)


def _check_packed(cu_seqlens: Tensor, batch: int, length: int, lengths: Tensor | None) -> int:
    if batch != 1 or lengths is not None or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            "Packed sequences lie in one row, without lengths, between the boundaries "
            f"[sequences + 1]; found a batch of {batch}, cu_seqlens {_shapes(cu_seqlens)} "
            f"and lengths={'None' if lengths is None else _shapes(lengths)}."
        )
    found = cu_seqlens.tolist()
    if found[0] != 0 or found[-1] != length or sorted(found) != found:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {length}; found {found}."
        )
    return len(found) - 1


def _check_state(
    layers: int,
    state: State,
    shape: tuple[int, int, int],
    coefficient: Tensor,
    q: Tensor,
    remember: int,
) -> None:
    rows, heads, dim = state.now.v.shape[0], state.now.v.shape[1], state.now.v.shape[3]
    same = (rows, heads, dim) == shape and state.chunk == len(coefficient)
    if not same or len(state.now.inputs) != layers:
        raise ValueError(
            f"The state is of {len(state.now.inputs)} layers, {rows} rows, {heads} heads of {dim} "
            f"and chunks of {state.chunk}; the tokens are for {layers} layers, {shape[0]} rows, "
            f"{shape[1]} heads of {shape[2]} and chunks of "
            f"{len(coefficient)}. Give the state that the same layer returned for the same rows."
        )
    if state.now.v.device != q.device:
        raise ValueError(
            f"The state is on {state.now.v.device} and the tokens on {q.device}; "
            f"move it with state.to({str(q.device)!r})."
        )
    if state.now.v.dtype != q.dtype:
        raise ValueError(
            f"The state holds tokens of {state.now.v.dtype} and these are of {q.dtype}; "
            "cast them, or begin anew."
        )
    if remember > len(state.past) * state.chunk:
        raise ValueError(
            f"remember={remember} cannot be asked of a state that was begun to remember "
            f"{len(state.past) * state.chunk} tokens; give it with the first tokens."
        )


def _check_start(
    layers: int, start: Sequence[Tensor], rows: int, heads: int, dim: int, q: Tensor
) -> None:
    fits = len(start) == 2 * layers and all(
        p.dim() in (3, 4) and p.shape[-3] == heads for p in start
    )
    if fits:
        w, b = start[0], start[1]
        last = start[-2]
        fits = w.shape[-2] == dim and last.shape[-1] == dim and b.shape[-2:] == (1, w.shape[-1])
        fits &= layers == 1 or last.shape[-2] == w.shape[-1]
        fits &= start[-1].shape[-2:] == (1, dim)
        fits &= all(p.dim() == 3 or p.shape[0] == rows for p in start)
    if not fits:
        raise ValueError(
            f"The start parameters must be {_PARAMETERS[layers]}, with or without a batch in "
            f"front, here for {rows} rows, {heads} heads and D={dim}; found {_shapes(*start)}."
        )
    if any(p.device != q.device for p in start):
        raise ValueError(
            f"The start parameters are on {start[0].device} and the tokens on {q.device}; "
            "move one of them."
        )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors)
