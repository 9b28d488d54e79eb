"""Every form of the operator equals the reference, and the operator keeps its word."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.ops.mttt_inputs import BATCH, HEADS, TOKENS, WIDTH, Inputs, gap, inputs, outcome
from testtime.ops.mttt import Decoder, Dot, chosen_form, mttt, random_order

CASES = [
    (learner, norm, bias, steps, sgd)
    for learner, norm, bias in itertools.product(("linear", "mlp"), (False, True), (False, True))
    for steps, sgd in ((0, False), (1, False), (3, False), (3, True))
]


def forms_of(learner: str, norm: bool, steps: int, sgd: bool) -> list[str]:
    moments = learner == "linear" and not norm and steps == 1 and not sgd
    return ["written", "narrow", "chunked", *["moments"] * moments]


@pytest.mark.parametrize("padded", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize(("learner", "norm", "bias", "steps", "sgd"), CASES)
def test_every_form_equals_the_reference(learner, norm, bias, steps, sgd, padded):
    given = inputs(learner, norm, bias)
    rates = torch.rand(max(steps, 1), HEADS, dtype=torch.float64).requires_grad_()
    kwargs = {"steps": steps, "inner_lr": rates}
    if sgd:
        kwargs["order"] = random_order(HEADS, TOKENS)
    if padded:
        kwargs["key_padding_mask"] = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
        kwargs["key_padding_mask"][0, 9:] = kwargs["key_padding_mask"][1, 3] = True
    want = outcome(given, form="reference", **kwargs)
    for form in forms_of(learner, norm, steps, sgd):
        assert gap(outcome(given, form=form, chunk_size=4, **kwargs), want) < 1e-10, form


@pytest.mark.parametrize("learner", ["glu", "dwconv", "linear"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_dot_product_written_out_equals_the_reference(learner, steps):
    given = inputs(learner, bias=False)
    if learner == "linear":
        given = given._replace(x=given.k.detach().flip(0).requires_grad_(), decoder=Dot())
    rates = torch.rand(steps, HEADS, dtype=torch.float64).requires_grad_()
    kwargs = {"steps": steps, "inner_lr": rates}
    want = outcome(given, form="reference", **kwargs)
    assert gap(outcome(given, **kwargs), want) < 1e-10


@pytest.mark.parametrize("form", ["reference", "written", "chunked"])
def test_first_order_leaves_out_the_inner_gradient(form):
    given = inputs("mlp")
    whole = outcome(given, steps=2, form=form)
    first = outcome(given, steps=2, form=form, differentiate=False)
    values = 2 + len(given.w0)
    assert gap(first[:values], whole[:values]) == 0
    of_q, of_k, of_x = first[values : values + 3]
    assert of_q.any()
    assert not of_k.any()
    assert not of_x.any()
    want = outcome(given, steps=2, form="reference", differentiate=False)
    assert gap(first, want) < 1e-10


def tiny(given: Inputs) -> Inputs:
    """Return one image and few tokens of it: gradcheck takes a forward for every number."""
    cut = {name: getattr(given, name)[:1] for name in "qkx"}
    if given.learner != "dwconv":
        cut = {n: v[:, :5] if v.dim() == 3 else v[:, :, :5] for n, v in cut.items()}
    return given._replace(**{n: v.detach().requires_grad_() for n, v in cut.items()})


@pytest.mark.parametrize(
    ("learner", "norm", "form"),
    [
        ("linear", False, "moments"),
        ("linear", True, "narrow"),
        ("mlp", False, "chunked"),
        ("mlp", True, "chunked"),
        ("mlp", True, "written"),
        ("glu", False, "written"),
        ("dwconv", False, "written"),
    ],
)
def test_gradients_are_derivatives(learner, norm, form):
    given = tiny(inputs(learner, norm))
    names = list(given.w0)

    def answer(q, k, x, *rest):
        decoder = given.decoder
        if isinstance(decoder, Decoder):
            decoder = Decoder(*rest[len(names) :])
        w0 = dict(zip(names, rest, strict=False))
        o, _, state = Inputs(q, k, x, w0, decoder, learner).run(form=form, state=True, chunk_size=2)
        return o, *state.values()

    assert torch.autograd.gradcheck(answer, given.leaves(), fast_mode=True)
    if form == "written":
        assert torch.autograd.gradgradcheck(answer, given.leaves(), fast_mode=True)


def test_squashing_is_smooth_at_columns_of_zeros():
    given = inputs("glu")
    x = given.x.detach().clone()
    x[..., 1:] = 0
    given = tiny(given._replace(x=x))

    def answer(q, k, x):
        return mttt(q, k, x, given.w0, Dot(), learner="glu", state=True)[2]["weight_1"]

    assert torch.autograd.gradcheck(answer, given.leaves()[:3], fast_mode=True)


# What torch.compile itself does while it traces an autograd.Function.
traces = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@traces
@pytest.mark.parametrize(
    ("learner", "form"),
    [
        ("linear", "moments"),
        ("mlp", "written"),
        ("mlp", "narrow"),
        ("dwconv", "written"),
    ],
)
def test_a_form_compiles_and_checkpoints(learner, form):
    given = inputs(learner, norm=form != "moments")

    def answer(*tensors):
        decoder = given.decoder
        size = 3 + len(given.w0)
        if isinstance(decoder, Decoder):
            decoder = Decoder(*tensors[size:])
        w0 = dict(zip(given.w0, tensors[3:size], strict=True))
        return Inputs(*tensors[:3], w0, decoder, learner).run(form=form)[0]

    def gradients(o):
        return torch.autograd.grad(o.square().sum(), given.leaves())

    leaves = given.leaves()
    want = answer(*leaves)
    compiled = torch.compile(answer, fullgraph=True, backend="aot_eager")(*leaves)
    again = checkpoint(answer, *leaves, use_reentrant=False)
    wanted = gradients(want)
    for got in (compiled, again):
        assert gap([got, *gradients(got)], [want, *wanted]) < 1e-12
    with torch.no_grad():
        assert gap([answer(*leaves)], [want]) < 1e-12
    with torch.inference_mode():
        assert gap([answer(*leaves)], [want]) < 1e-12


@pytest.mark.parametrize("form", ["narrow", "chunked"])
def test_a_second_derivative_is_refused_in_words(form):
    given = inputs("mlp")
    o = given.run(form=form)[0]
    (slope,) = torch.autograd.grad(o.square().sum(), given.q, create_graph=True)
    with pytest.raises(RuntimeError, match=f"The {form} form.*first derivative only.*'written'"):
        slope.sum().backward()


@pytest.mark.parametrize("form", ["written", "narrow", "moments"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(form, dtype):
    given = inputs("linear" if form == "moments" else "mlp", form != "moments", dtype=torch.float32)
    half = given._replace(**{n: getattr(given, n).to(dtype) for n in "qkx"})
    single = given._replace(**{n: getattr(half, n).float() for n in "qkx"})
    with torch.autocast("cpu", torch.bfloat16):
        o, losses, state = half.run(form=form, losses=True, state=True)
    want = single.run(form=form, losses=True, state=True)
    assert o.dtype == dtype
    assert torch.equal(o, want[0].to(dtype))
    assert torch.equal(losses, want[1])
    assert all(torch.equal(w, want[2][name]) for name, w in state.items())


@pytest.mark.parametrize(("form", "bar"), [("written", 2e-6), ("narrow", 5e-6)])
def test_single_precision_is_near_double(form, bar):
    exact = inputs("mlp")
    single = inputs("mlp", dtype=torch.float32)
    got = [t.double() for t in outcome(single, steps=2, form=form)]
    assert gap(got, outcome(exact, steps=2, form=form)) < bar


class Net(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 4 * WIDTH)
        self.out = nn.Linear(4 * WIDTH, width)

    def forward(self, u):
        return self.out(nn.functional.gelu(self.into(u), approximate="tanh"))


@traces
def test_a_module_is_a_learner():
    given, net = inputs("mlp"), Net()
    names = {"into.weight": "weight_1", "into.bias": "bias_1"}
    names |= {"out.weight": "weight_2", "out.bias": "bias_2"}

    def answer(q, k):
        w0 = {own: given.w0[n].mT if "weight" in n else given.w0[n] for own, n in names.items()}
        return mttt(q, k, given.x, w0, given.decoder, learner=net)[0]

    def gradients(o):
        return torch.autograd.grad(o.square().sum(), given.leaves())

    want = given.run()[0]
    wanted = [want, *gradients(want)]
    q, k = given.q, given.k
    for got in (
        answer(q, k),
        checkpoint(answer, q, k, use_reentrant=False),
        torch.compile(answer, fullgraph=True, backend="aot_eager")(q, k),
    ):
        assert gap([got, *gradients(got)], wanted) < 1e-10
    with torch.inference_mode():
        assert gap([answer(q, k)], [want]) < 1e-10


@pytest.mark.parametrize("form", ["written", "chunked", "reference"])
def test_padded_tokens_are_as_if_absent(form):
    given = inputs("mlp")
    mask = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    mask[:, 9:] = True
    hole = {n: getattr(given, n).detach().clone() for n in "kx"}
    hole["k"][:, :, 9:] = hole["x"][:, 9:] = torch.nan
    got = given._replace(**hole).run(key_padding_mask=mask, form=form, losses=True, chunk_size=4)
    short = given._replace(k=given.k[:, :, :9], x=given.x[:, :9])
    want = short.run(form=form, losses=True)
    assert gap(list(got[:2]), list(want[:2])) < 1e-12


def test_a_masked_row_of_a_grid_is_as_the_zeros_outside_it():
    given = inputs("dwconv")
    mask = torch.zeros(BATCH, 15, dtype=torch.bool)
    mask[:, 10:] = True
    got = given.run(key_padding_mask=mask)[0]
    cut = [t[:, :, :10] for t in given[:3]]
    want = mttt(*cut, given.w0, Dot(), learner="dwconv", grid=(2, 5))[0]
    assert gap([got[:, :, :10]], [want]) < 1e-12


@pytest.mark.parametrize("learner", ["linear", "mlp", "glu", "dwconv"])
def test_an_image_alone_equals_the_image_in_a_batch(learner):
    given = inputs(learner)
    alone = given._replace(q=given.q[1:], k=given.k[1:], x=given.x[1:])
    assert gap([given.run()[0][1:]], [alone.run()[0]]) < 1e-12


def test_what_is_not_finite_spoils_its_own_image_alone():
    given = inputs("mlp")
    x = given.x.detach().clone()
    x[0, 0, 0] = torch.nan
    o = given._replace(x=x).run()[0]
    assert o[0].isnan().all()
    assert torch.equal(o[1], given.run()[0][1])


def test_permuting_the_tokens_permutes_the_answers():
    given, order = inputs("mlp"), torch.randperm(TOKENS)
    moved = given._replace(q=given.q[:, :, order], k=given.k[:, :, order], x=given.x[:, order])
    assert gap([moved.run()[0]], [given.run()[0][:, :, order]]) < 1e-12


def test_two_steps_are_one_and_one_more():
    given = inputs("mlp")
    half = given.run(inner_lr=0.5, state=True)[2]
    want = given._replace(w0=half).run(inner_lr=0.25)[0]
    assert gap([given.run(steps=2, inner_lr=(0.5, 0.25))[0]], [want]) < 1e-12


def test_one_block_is_the_full_batch_and_blocks_differ_by_at_most_one():
    given, order = inputs("mlp"), random_order(HEADS, TOKENS)
    assert gap([given.run(order=order)[0]], [given.run()[0]]) < 1e-12
    # The second of three blocks of 13 tokens, by hand: tokens 5 to 8 of the order.
    order = torch.arange(TOKENS)
    w1 = given.run(order=order, steps=3, max_steps=1, state=True)[2]
    w2 = given.run(order=order, steps=3, max_steps=2, state=True)[2]
    block = given._replace(k=given.k[:, :, 5:9], x=given.x[:, 5:9], w0=w1)
    assert gap([*block.run(state=True)[2].values()], [*w2.values()]) < 1e-12


def test_rates_that_are_missing_repeat_the_last():
    given = inputs("mlp")
    assert torch.equal(
        given.run(steps=3, inner_lr=(1.0, 0.5))[0], given.run(steps=3, inner_lr=(1.0, 0.5, 0.5))[0]
    )


def test_orders_are_drawn_as_the_authors_draw_them():
    order = random_order(5, 197, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort(-1).values, torch.arange(197).expand(5, -1))
    assert torch.equal(order, random_order(5, 197, torch.Generator().manual_seed(0)))
    assert not torch.equal(order[0], order[1])


def kept(given: Inputs, **kwargs) -> int:
    """Return how many numbers are kept for backward, beside the inputs."""
    sizes: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in given.leaves()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        o = given.run(**kwargs)[0]
    assert o.requires_grad
    return sum(sizes.values())


def test_the_narrow_form_keeps_the_inputs_and_the_adapted_weights():
    given = inputs("mlp")
    weights = BATCH * sum(w.numel() for w in given.w0.values())
    # W_1, and the rate of each head.
    assert kept(given, form="narrow") <= weights + HEADS
    assert kept(given, form="written") > 10 * given.x.numel()


def test_losses_and_state_come_on_request():
    given = inputs("mlp")
    _, losses, state = given.run()
    assert losses is None
    assert state is None
    _, losses, state = given.run(steps=2, losses=True, state=True)
    assert losses.shape == (BATCH, HEADS, 3)
    assert not losses.requires_grad
    assert {n: w.shape for n, w in state.items()} == {
        n: (BATCH, *w.shape) for n, w in given.w0.items()
    }


@pytest.mark.parametrize(
    ("tokens", "kwargs", "form"),
    [
        (196, {"learner": "linear"}, "moments"),
        (196, {"learner": "linear", "norm": True}, "narrow"),
        (196, {"learner": "linear", "steps": 2}, "narrow"),
        (196, {"learner": "linear", "sgd": True}, "narrow"),
        (196, {"learner": "mlp"}, "narrow"),
        (50176, {"learner": "mlp"}, "chunked"),
        (50176, {"learner": "linear"}, "moments"),
        (196, {"learner": "mlp", "steps": 0}, "written"),
        (196, {"learner": "glu", "decoder": Dot()}, "written"),
        (196, {"learner": "linear", "decoder": Dot()}, "written"),
        (196, {"learner": Net()}, "reference"),
    ],
)
def test_the_form_that_is_chosen_and_why(tokens, kwargs, form):
    choice = chosen_form(tokens, **kwargs)
    assert choice.form == form
    assert choice.reason
