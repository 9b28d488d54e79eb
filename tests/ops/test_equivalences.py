"""MTTT and attention: where they are the same, and by how much each broken assumption shows.

A linear learner, one step. From W0 = 0 without bias every prediction is zero, so the decoder gives
g_b and the residual at token j is g_b - x_j. The gradient of ``H / (2 n D) sum |m G + g_b - x|^2``
there is ``-(H / n D) sum_j k_j^T (x_j - g_b) G^T``, and one step of size eta against it gives
``W_1 = (eta H / n D) sum_j k_j^T v_j`` with v_j = (x_j - g_b) G^T. The answer q_i W_1 is
``(eta H / n D) sum_j <q_i, k_j> v_j``: linear attention with the identity map, divided by n D / H,
whose value projection is G^T and whose value bias is -g_b G^T. The derivation uses each of: a
linear learner, no bias, W0 = 0, one step, all tokens, no LayerNorm.

With a bias from zero the learner is a linear one without, on (k, 1). A second step at rate 1 starts
from W_1: its residual has k_j W_1 G besides, so W_2 = 2 W_1 - (H / n D) K^T K W_1 G G^T.

A learner without weights: the Nadaraya-Watson estimate of the values, sum_j kappa(q_i, k_j) v_j
over sum_j kappa(q_i, k_j), with kappa(q, k) = exp(q . k). The weights of its mean are a softmax
over the tokens, so it is a head of softmax attention, without scale. Nothing is left for a step to
change.

Source: arXiv 2310.13807, section 3; the divisor n D / H, in place of n, is the authors' code's.
"""

import pytest
import torch
from torch import Tensor

from tests.ops.mttt_inputs import BATCH, HEADS, TOKENS, WIDTH, gap, inputs
from testtime.ops.mttt import Decoder, mttt, random_order


def linear_attention(q: Tensor, k: Tensor, v: Tensor, divisor: float) -> Tensor:
    return q @ (k.mT @ v) / divisor


def setting():
    given = inputs("linear", norm=False, bias=False)
    return given._replace(w0={"weight": torch.zeros_like(given.w0["weight"]).requires_grad_()})


def value(given) -> Tensor:
    weight, bias = given.decoder[:2]
    return torch.einsum("bnd,hpd->bhnp", given.x - bias, weight)


def divisor(n: int = TOKENS) -> float:
    return n * 10 / HEADS  # n D / H


def gradients(o: Tensor, given) -> list[Tensor]:
    leaves = [given.q, given.k, given.x, *given.decoder[:2]]
    return [o, *torch.autograd.grad(o.sin().sum(), leaves, retain_graph=True)]


@pytest.mark.parametrize("form", ["reference", "written", "moments", "narrow", "chunked"])
def test_a_linear_learner_from_zero_is_linear_attention(form):
    given = setting()
    got = gradients(given.run(form=form, chunk_size=5)[0], given)
    want = gradients(linear_attention(given.q, given.k, value(given), divisor()), given)
    assert gap(got, want) < 1e-12


def test_another_rate_is_another_divisor():
    given = setting()
    got = given.run(inner_lr=0.25)[0]
    want = linear_attention(given.q, given.k, value(given), divisor() / 0.25)
    assert gap([got], [want]) < 1e-12


def test_with_a_bias_it_is_linear_attention_with_a_one_appended():
    given = setting()
    bias = torch.zeros(HEADS, WIDTH, dtype=torch.float64)
    got = given._replace(w0={**given.w0, "bias": bias}).run()[0]
    one = torch.ones(BATCH, HEADS, TOKENS, 1, dtype=torch.float64)
    q, k = (torch.cat([t, one], -1) for t in (given.q, given.k))
    assert gap([got], [linear_attention(q, k, value(given), divisor())]) < 1e-12


def test_any_linear_attention_is_a_linear_learner():
    given = setting()
    torch.manual_seed(0)
    # The heads' values are slices of one projection, and g_b solves g_b G^T = -b_v.
    width = HEADS * WIDTH
    w_v, b_v = torch.randn(width, width).double(), torch.randn(width).double()
    x = torch.randn(BATCH, TOKENS, width).double()
    v = (x @ w_v.T + b_v).view(BATCH, TOKENS, HEADS, WIDTH).transpose(1, 2)
    decoder = Decoder(w_v.view(HEADS, WIDTH, width), -torch.linalg.solve(w_v, b_v))
    got = mttt(given.q, given.k, x, given.w0, decoder, learner="linear")[0]
    assert gap([got], [linear_attention(given.q, given.k, v, TOKENS * WIDTH)]) < 1e-12


def test_two_steps_are_linear_attention_with_a_preconditioned_state():
    given = setting()
    k, weight, c = given.k, given.decoder.weight, 1 / divisor()
    w1 = c * k.mT @ value(given)
    w2 = 2 * w1 - c * (k.mT @ k) @ w1 @ (weight @ weight.mT)
    assert gap([given.run(steps=2)[0]], [given.q @ w2]) < 1e-12


class Smoother(torch.nn.Module):
    """The Nadaraya-Watson estimator has no weights and takes no step: it is its data."""

    def forward(self, q: Tensor, k: Tensor, z: Tensor) -> Tensor:
        kernel = (q @ k.mT).exp()
        return kernel @ z / kernel.sum(-1, keepdim=True)


def test_a_kernel_smoother_is_softmax_attention():
    given = setting()
    got = Smoother()(given.q, given.k, value(given))
    want = torch.nn.functional.scaled_dot_product_attention(
        given.q, given.k, value(given), scale=1.0
    )
    assert gap([got], [want]) < 1e-12


@pytest.mark.parametrize(
    ("broken", "least"),
    [
        ("first weights", 0.1),
        ("bias", 0.01),
        ("norm", 0.1),
        ("two steps", 0.1),
        ("mini-batches", 0.1),
        ("divisor", 0.1),
    ],
)
def test_a_broken_assumption_breaks_it(broken, least):
    given, kwargs, n = setting(), {}, TOKENS
    if broken == "first weights":
        given = given._replace(w0=inputs("linear", bias=False).w0)
    elif broken == "bias":
        bias = torch.zeros(HEADS, WIDTH, dtype=torch.float64)
        given = given._replace(w0={**given.w0, "bias": bias})
    elif broken == "norm":
        given = given._replace(decoder=inputs("linear").decoder)
    elif broken == "two steps":
        kwargs = {"steps": 2}
    elif broken == "mini-batches":
        kwargs = {"steps": 2, "order": random_order(HEADS, TOKENS)}
    else:
        n = 1
    want = linear_attention(given.q, given.k, value(given), divisor(n))
    assert gap([given.run(**kwargs)[0]], [want]) > least
