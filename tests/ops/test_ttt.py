"""TTT-Linear and TTT-MLP: every form is the reference, every split is the whole."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import case, error
from testtime.ops.ttt.state import State
from testtime.ops.ttt_mlp import ttt_mlp

KINDS = ("linear", "mlp")
both = pytest.mark.parametrize("kind", KINDS)


def gradients(outputs: list[Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the gradients of a random sum of all outputs."""
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in outputs]
    return torch.autograd.grad(outputs, leaves, weights)


@both
@pytest.mark.parametrize(("length", "chunk"), [(11, 4), (12, 4), (3, 4), (1, 4), (5, 1), (7, 7)])
@pytest.mark.parametrize("recompute", [1, 2, 16])
def test_the_chunked_form_is_the_reference(
    kind: str, length: int, chunk: int, recompute: int
) -> None:
    one = case(kind, length=length, chunk=chunk).grad()
    o, now, total = one.reference(*one.tokens, *one.slow, one.start)
    found = one(recompute=recompute)
    mine = [found.o, *found.state.now.start, *found.state.sums()]
    theirs = [o, *now, *total]
    assert max(map(error, mine[: len(now) + 1], theirs)) < 1e-12
    some = [i for i, t in enumerate(theirs) if t.requires_grad and mine[i].requires_grad]
    expected = gradients([theirs[i] for i in some], one.leaves())
    for a, b in zip(gradients([mine[i] for i in some], one.leaves()), expected, strict=True):
        assert error(a, b) < 1e-10 or float((a - b).abs().max()) < 1e-13


@both
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    one = case(kind, batch=1, heads=1, length=7, dim=4, chunk=3).grad()

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        tokens, slow, start = leaves[:4], leaves[4:7], leaves[7:]
        found = one.operator(*tokens, *slow, start)
        return (found.o, *found.state.now.start, *found.state.sums(), *found.state.read())

    assert torch.autograd.gradcheck(run, one.leaves(), fast_mode=True)


def split(length: int, seed: int) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    cuts = sorted(draw.sample(range(1, length), draw.randint(1, length - 1)))
    return list(pairwise([0, *cuts, length]))


@both
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_any_split_is_the_whole(kind: str, seed: int, dtype: torch.dtype, bar: float) -> None:
    one = case(kind, length=23, chunk=5, dtype=dtype, seed=seed)
    whole, state, outputs = one(), None, []
    for first, last in split(23, seed):
        found = one(one.piece(first, last), state)
        state = found.state
        outputs.append(found.o)
    assert error(torch.cat(outputs, 2), whole.o) < bar
    for a, b in zip(state.read(), whole.state.read(), strict=True):
        assert error(a, b) < bar
    assert state.position.tolist() == [23, 23]


@both
def test_gradients_flow_through_hand_overs(kind: str) -> None:
    one = case(kind, length=13, chunk=4).grad()
    whole = one()
    expected = gradients([whole.o, *whole.state.read()], one.leaves())
    for pieces in ([(0, 6), (6, 7), (7, 13)], [(0, 2), (2, 3), (3, 4), (4, 13)]):
        state, outputs = None, []
        for first, last in pieces:
            found = one(one.piece(first, last), state)
            state = found.state
            outputs.append(found.o)
        mine = gradients([torch.cat(outputs, 2), *state.read()], one.leaves())
        assert max(map(error, mine, expected)) < 1e-12
    # The single token may as well be decoded.
    first = one(one.piece(0, 12))
    last = one(one.piece(12, 13), first.state, form="decode")
    mine = gradients([torch.cat((first.o, last.o), 2), *last.state.read()], one.leaves())
    assert max(map(error, mine, expected)) < 1e-12


@both
def test_the_tail_is_no_state_to_go_on_from(kind: str) -> None:
    one = case(kind, length=10, chunk=4)
    first = one(one.piece(0, 6))
    wrong = one(one.piece(6, 10), first.state.read())
    assert error(wrong.o, one().o[:, :, 6:]) > 1e-3


@both
def test_rows_stand_at_different_positions(kind: str) -> None:
    one = case(kind, batch=4, length=14, chunk=4)
    lengths = torch.tensor([14, 1, 0, 7])
    after = torch.tensor([0, 9, 5, 4])
    first = one(lengths=lengths)
    index = (lengths[:, None] + torch.arange(9)).clamp(max=13)
    more = tuple(
        t.gather(2, index.view(4, 1, 9, *[1] * (t.dim() - 3)).expand(4, 2, 9, *t.shape[3:]))
        for t in one.tokens
    )
    second = one(more, first.state, lengths=after)
    assert second.state.position.tolist() == [14, 10, 5, 11]
    for row in range(4):
        n, m = int(lengths[row]), int(after[row])
        alone = one(one.piece(0, n + m, slice(row, row + 1)))
        assert error(first.o[row, :, :n], alone.o[0, :, :n]) < 1e-12
        assert error(second.o[row, :, :m], alone.o[0, :, n:]) < 1e-12
        assert not first.o[row, :, n:].any()
        for a, b in zip(second.state.read(), alone.state.read(), strict=True):
            assert error(a[row], b[0]) < 1e-12


@both
def test_padding_takes_no_gradient(kind: str) -> None:
    one = case(kind, batch=3, length=9, chunk=4).grad()
    lengths = torch.tensor([9, 6, 2])
    found = one(lengths=lengths)
    mine = gradients([found.o, *found.state.read()], one.leaves())
    assert all(not mine[i][row, :, n:].any() for i in range(4) for row, n in enumerate(lengths))
    with torch.no_grad():
        others = [t.clone() for t in one.tokens]
        for t in others:
            t[1, :, 6:], t[2, :, 2:] = 1e3, -1e3
    other = one(tuple(others), lengths=lengths)
    assert torch.equal(other.o, found.o)
    assert all(map(torch.equal, other.state.read(), found.state.read()))


@both
def test_packed_sequences_are_sequences_of_their_own(kind: str) -> None:
    one = case(kind, batch=1, length=17, chunk=4).grad()
    boundaries = torch.tensor([0, 3, 3, 12, 17])
    found = one(cu_seqlens=boundaries, losses=True)
    assert found.losses.shape == (2, 1, 2, 17)
    outputs, reads = [], []
    for n, (first, last) in enumerate(pairwise(boundaries.tolist())):
        alone = one(one.piece(first, last), losses=True)
        outputs.append(alone.o)
        reads.append(alone.state.read())
        assert error(found.losses[..., first:last], alone.losses) < 1e-12
        assert all(
            error(a[n], b[0]) < 1e-12 for a, b in zip(found.state.read(), reads[-1], strict=True)
        )
    assert error(found.o, torch.cat(outputs, 2)) < 1e-12
    theirs = [torch.cat(outputs, 2), *(torch.cat(parts) for parts in zip(*reads, strict=True))]
    expected = gradients(theirs, one.leaves())
    mine = gradients([found.o, *found.state.read()], one.leaves())
    assert max(map(error, mine, expected)) < 1e-12
    # Each goes on from its own row.
    more = one(one.piece(0, 8), found.state, cu_seqlens=torch.tensor([0, 1, 3, 3, 8]))
    assert more.state.position.tolist() == [4, 2, 9, 10]


@both
def test_a_state_is_a_value(kind: str) -> None:
    one = case(kind, length=11, chunk=4)
    state = one(one.piece(0, 7)).state
    before = {name: t.clone() for name, t in state.tensors().items()}
    first, again = (one(one.piece(7, 8), state) for _ in range(2))
    one(one.piece(8, 11), first.state)
    assert torch.equal(first.o, again.o)
    assert all(torch.equal(t, before[name]) for name, t in state.tensors().items())


@both
def test_rows_are_reordered_and_repeated(kind: str) -> None:
    one = case(kind, batch=3, length=11, chunk=4)
    state = one(one.piece(0, 6)).state
    index = torch.tensor([2, 0, 2])
    found = one(one.piece(6, 11, index), state.rows(index))
    assert error(found.o, one().o[index, :, 6:]) < 1e-12


@both
@pytest.mark.parametrize("back", [0, 1, 3, 5, 8, [7, 0, 2]])
def test_rolling_back_is_exact(kind: str, back: Any) -> None:
    one = case(kind, batch=3, length=16, chunk=4)
    prefix = one(one.piece(0, 5), remember=8)
    state, states = prefix.state, {5: prefix.state}
    for t in range(5, 15):
        state = one(one.piece(t, t + 1), state).state
        states[t + 1] = state
    rolled = state.roll_back(torch.tensor(back))
    for row, k in enumerate([back] * 3 if isinstance(back, int) else back):
        then = states[15 - k]
        for name, tensor in then.now.tensors().items():
            assert torch.equal(rolled.now.tensors()[name][row], tensor[row]), name
        assert rolled.position[row] == then.position[row]
        follow = one(one.piece(15 - k, 16, slice(row, row + 1)), rolled.rows(torch.tensor([row])))
        assert error(follow.o, one().o[row : row + 1, :, 15 - k :]) < 1e-12


@both
def test_what_pieces_of_any_length_wrote_is_rolled_back(kind: str) -> None:
    one = case(kind, batch=3, length=30, chunk=4)
    lengths = torch.tensor([19, 2, 7])
    state = one(one.piece(0, 19), lengths=lengths, remember=8).state
    more = torch.tensor([3, 11, 6])
    index = (lengths[:, None] + torch.arange(11)).clamp(max=29)
    rest = tuple(
        t.gather(2, index.view(3, 1, 11, *[1] * (t.dim() - 3)).expand(3, 2, 11, *t.shape[3:]))
        for t in one.tokens
    )
    state = one(rest, state, lengths=more).state
    rolled = state.roll_back(torch.tensor([8, 8, 7]))
    for row, position in enumerate([14, 5, 6]):
        alone = one(one.piece(0, position, slice(row, row + 1))).state
        assert rolled.position[row] == position
        for name, tensor in alone.now.tensors().items():
            assert torch.allclose(rolled.now.tensors()[name][row], tensor[0], atol=1e-12), name
    assert rolled.remembered.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="remembers"):
        rolled.roll_back(1)


@both
def test_states_are_saved_and_loaded(kind: str) -> None:
    one = case(kind, length=11, chunk=4)
    state = one(one.piece(0, 9), remember=3).state
    loaded = State.load(state.tensors())
    assert torch.equal(one(one.piece(9, 11), loaded).o, one(one.piece(9, 11), state).o)
    assert torch.equal(loaded.roll_back(2).position, state.roll_back(2).position)
    with pytest.raises(ValueError, match=r"State\.tensors"):
        State.load({"position": state.position})


@both
def test_a_rate_of_zero_leaves_the_start(kind: str) -> None:
    one = case(kind, length=9, chunk=4)
    still = one((*one.tokens[:3], torch.zeros_like(one.tokens[3])))
    for a, b in zip(still.state.read(), one.start, strict=True):
        assert torch.equal(a, b.expand_as(a))


@both
def test_order_inside_a_chunk_is_forgotten_behind_it(kind: str) -> None:
    one = case(kind, length=12, chunk=4)
    order = torch.tensor([0, 1, 2, 3, 6, 5, 4, 7, 8, 9, 10, 11])
    other = one(tuple(t[:, :, order] for t in one.tokens))
    assert error(other.o[:, :, 8:], one().o[:, :, 8:]) < 1e-12
    assert error(other.o[:, :, 4:8], one().o[:, :, 4:8]) > 1e-3


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_wide_state(kind: str, dtype: torch.dtype) -> None:
    one = case(kind, length=96, dim=16, chunk=8, dtype=dtype, std=0.05)
    exact = one._replace(
        tokens=tuple(t.double() for t in one.tokens),
        slow=tuple(t.double() for t in one.slow),
        start=tuple(t.double() for t in one.start),
    )()
    found = one()
    assert found.o.dtype == dtype
    assert {t.dtype for t in (*found.state.now.start, *found.state.now.gradients)} == {
        torch.float32
    }
    norm = (found.o.double() - exact.o).norm() / exact.o.norm()
    assert norm < 7e-3
    for a, b in zip(found.state.read(), exact.state.read(), strict=True):
        assert (a.double() - b).norm() / b.norm() < 7e-3
    # Split into pieces it is no worse, for each product rounds the same operands.
    state, outputs = None, []
    for first, last in [(0, 13), *((t, t + 1) for t in range(13, 40)), (40, 96)]:
        piece = one(one.piece(first, last), state)
        state = piece.state
        outputs.append(piece.o)
    split = torch.cat(outputs, 2)
    assert (split.double() - exact.o).norm() / exact.o.norm() < 1.01 * norm
    assert error(split, found.o) < 1e-2


@both
def test_gradients_in_half_precision(kind: str) -> None:
    one = case(kind, length=32, dim=16, chunk=8, dtype=torch.bfloat16, std=0.05).grad()
    exact = one._replace(
        tokens=tuple(t.double() for t in one.tokens),
        slow=tuple(t.double() for t in one.slow),
        start=tuple(t.double() for t in one.start),
    ).grad()
    mine, expected = gradients([one().o], one.leaves()), gradients([exact().o], exact.leaves())
    for a, b, leaf in zip(mine, expected, one.leaves(), strict=True):
        assert a.dtype == leaf.dtype
        assert (a.double() - b).norm() / b.norm() < 3e-2


@both
def test_it_is_deterministic(kind: str) -> None:
    one = case(kind, length=19).grad()
    first, again = (gradients([one().o], one.leaves()) for _ in range(2))
    assert all(map(torch.equal, first, again))


@both
def test_a_token_that_is_not_finite_spoils_its_own_row(kind: str) -> None:
    one = case(kind, batch=2, length=11, chunk=4)
    tokens = [t.clone() for t in one.tokens]
    tokens[1][0, :, 9] = float("nan")
    found = one(tuple(tokens), remember=4)
    assert torch.equal(found.o[1], one().o[1])
    assert found.o[0, :, 9:].isnan().all()
    assert error(found.o[0, :, :8], one().o[0, :, :8]) < 1e-12
    rolled = found.state.roll_back(torch.tensor([2, 0]))
    assert (
        error(
            one(one.piece(9, 11, slice(0, 1)), rolled.rows(torch.tensor([0]))).o, one().o[:1, :, 9:]
        )
        < 1e-12
    )


@both
def test_the_inner_losses(kind: str) -> None:
    one = case(kind, length=9, chunk=4)
    found = one(losses=True)
    assert found.losses.shape == (2, 2, 2, 9)
    assert torch.equal(found.o, one().o)
    # After: f(k) = o - k where q is k. Before: the same where nothing moves.
    own = one((one.tokens[1], *one.tokens[1:]))
    after = (own.o - one.tokens[2]).square().sum(-1) / 2
    assert error(found.losses[1], after) < 1e-12
    still = one((one.tokens[1], *one.tokens[1:3], torch.zeros_like(one.tokens[3])))
    before = (still.o - one.tokens[2]).square().sum(-1) / 2
    assert error(found.losses[0, :, :, :4], before[:, :, :4]) < 1e-12
    state = one(one.piece(0, 2)).state
    assert error(one(one.piece(2, 9), state, losses=True).losses, found.losses[..., 2:]) < 1e-12


@both
def test_the_form_that_ran_is_told(kind: str) -> None:
    one = case(kind, length=6)
    first = one(one.piece(0, 5))
    assert first.form == "chunked"
    assert one(one.piece(5, 6), first.state).form == "decode"
    assert one(one.piece(5, 6), first.state, form="chunked").form == "chunked"
    graded = one.grad()
    assert graded(graded.piece(5, 6), first.state).form == "chunked"


@both
def test_no_tokens_change_nothing(kind: str) -> None:
    one = case(kind, length=6)
    state = one().state
    found = one(one.piece(0, 0), state)
    assert found.o.shape == (2, 2, 0, 6)
    assert all(map(torch.equal, found.state.read(), state.read()))
    assert one(one.piece(0, 0)).state.position.tolist() == [0, 0]


@both
def test_it_compiles(kind: str) -> None:
    one = case(kind, length=11).grad()
    compiled = torch.compile(one.operator, backend="aot_eager", fullgraph=True)
    found = compiled(*one.tokens, *one.slow, one.start)
    assert error(found.o, one().o) < 1e-12
    expected = gradients([one().o, *one().state.read()], one.leaves())
    mine = gradients([found.o, *found.state.read()], one.leaves())
    assert max(map(error, mine, expected)) < 1e-12


@both
def test_the_operator_is_registered_as_torch_wants_it(kind: str) -> None:
    one = case(kind, length=8).grad()
    start = [p.detach().repeat(2, 1, 1, 1).requires_grad_() for p in one.start]
    closed = torch.full((2,), 2)
    torch.library.opcheck(
        getattr(torch.ops.testtime, f"ttt_{kind}").default,
        (*one.tokens, *one.slow, start, closed, 1e-6, False, 1, True, 1, True),
    )


# Relatives that the layer contains. No argument of the operator takes norm and residual away, but
# the affine read-out and the sums that it is made of have neither.
def test_without_norm_chunk_1_is_the_delta_rule() -> None:
    from testtime.ops.ttt.affine import moved, sums

    one = case("linear", batch=1, heads=1, length=9)
    (q, k, v, lr), d = one.tokens, 6
    w, b, steps = torch.zeros(1, 1, d, d).double(), torch.zeros(1, 1, 1, d).double(), lr[..., None]
    state = torch.zeros(d, d).double()
    for t in range(9):
        x, y, now = k[:, :, t : t + 1], v[:, :, t : t + 1], steps[:, :, t : t + 1]
        g = x @ w - y  # of 1/2 ||x W - v||^2: no norm, no residual, no bias
        mine = moved(q[:, :, t : t + 1], w, b, x, g, now, g.dtype) + now * g
        w = w - sums(x, g, now, g.dtype)[0]
        key, value = k[0, 0, t], v[0, 0, t]
        state = state - lr[0, 0, t] * torch.outer(key, key @ state - value)
        assert error(w[0, 0], state) < 1e-13
        assert error(mine[0, 0, 0], q[0, 0, t] @ state) < 1e-12


def test_one_chunk_from_zero_is_linear_attention() -> None:
    from testtime.ops.ttt.affine import moved

    one = case("linear", length=9)
    q, k, v, _ = one.tokens
    w, b = torch.zeros(2, 2, 6, 6).double(), torch.zeros(2, 2, 1, 6).double()
    steps = torch.ones(9, 9).double().tril()
    g = k @ w - v
    found = moved(q, w, b, k, g, steps, g.dtype) + steps @ g  # less the bias's part
    assert error(found, (q @ k.mT).tril() @ v) < 1e-13


@both
def test_two_passes_see_both_sides(kind: str) -> None:
    one = case(kind, length=9, chunk=4)

    def two(tokens: tuple[Tensor, ...]) -> Tensor:
        return one(tokens).o + one(tuple(t.flip(2) for t in tokens)).o.flip(2)

    found = two(one.tokens)
    assert error(two(tuple(t.flip(2) for t in one.tokens)), found.flip(2)) < 1e-12
    for t in (0, 8):
        tokens = [x.clone() for x in one.tokens]
        tokens[1][:, :, t] += 1
        assert (two(tuple(tokens)) - found).abs().amax((0, 1, 3)).min() > 0


def test_the_authors_constants_are_close_to_the_exact_ones() -> None:
    one = case("mlp", length=11)
    official = ttt_mlp(*one.tokens, *one.slow, one.start, official=True)
    assert 0 < error(official.o, one().o) < 1e-8


@both
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.update(q=a["q"][:, :1]), "all alike"),
        (lambda a: a.update(v=a["v"].float()), "one floating dtype"),
        (lambda a: a.update(lr=a["lr"][:, :, :3]), "a rate for each token"),
        (lambda a: a.update(coefficient=a["coefficient"][:0]), "chunk of 1 token"),
        (lambda a: a.update(norm_bias=a["norm_bias"][:, :2]), r"\[heads, head_dim\]"),
        (lambda a: a.update(state=a["state"][:1]), "start parameters"),
        (lambda a: a.update(state=[p[:1] for p in a["state"]]), "start parameters"),
        (lambda a: a.update(state=[p.expand(3, *p.shape) for p in a["state"]]), "start parameters"),
        (lambda a: a.update(lengths=torch.tensor([1])), r"lengths must be \[batch\]"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 9])), "in one row"),
        (lambda a: a.update(recompute=0), "recompute at least 1"),
        (lambda a: a.update(remember=-1), "remember at least 0"),
        (lambda a: a.update(form="fast"), "form is one of"),
        (lambda a: a.update(form="decode"), "one token a row"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, change: Any, says: str) -> None:
    one = case(kind, length=9)
    names = ("q", "k", "v", "lr", "coefficient", "norm_weight", "norm_bias")
    arguments = dict(zip(names, (*one.tokens, *one.slow), strict=True)) | {"state": one.start}
    change(arguments)
    with pytest.raises(ValueError, match=says):
        one.operator(**arguments)


@both
@pytest.mark.parametrize("boundaries", [[0, 5], [1, 9], [0, 6, 4, 9]])
def test_boundaries_that_do_not_fit_are_refused(kind: str, boundaries: list[int]) -> None:
    with pytest.raises(ValueError, match="must rise from 0"):
        case(kind, batch=1, length=9)(cu_seqlens=torch.tensor(boundaries))


def test_states_of_another_layer_are_refused() -> None:
    one = case("linear", length=9)
    state = one().state
    with pytest.raises(ValueError, match="same layer"):
        case("mlp", length=9)(state=state)
    with pytest.raises(ValueError, match="same layer"):
        one(one.piece(0, 2, slice(0, 1)), state)
    with pytest.raises(ValueError, match="same layer"):
        case("linear", chunk=5)(state=state)
    with pytest.raises(ValueError, match="cast them"):
        case("linear", dtype=torch.float32)(state=state)
    with pytest.raises(ValueError, match="with the first tokens"):
        one(state=state, remember=1)
    with pytest.raises(ValueError, match="remembers"):
        state.roll_back(1)
    with pytest.raises(ValueError, match="carries none"):
        one.grad()(remember=4).state.roll_back(1)


def test_head_dim_96_and_layouts_that_are_not_contiguous() -> None:
    one = case("linear", dim=96, length=7)
    other = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in one.tokens)
    assert torch.equal(one(other).o, one().o)
    assert F.mse_loss(one().o, one.reference(*one.tokens, *one.slow, one.start)[0]) < 1e-20
