"""The MTTT layer: sizes, starts, orders, names, records, and what it refuses."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from testtime.layers import (
    MIXERS,
    MTTT,
    LinearAttention,
    SoftmaxAttention,
    ViTTT,
    from_official,
    mixer,
    record_inner,
    to_official,
)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("tokens", [4, 16])
def test_every_mixer_maps_tokens_to_tokens(name, tokens):
    torch.manual_seed(0)
    layer, x = mixer(name, 24, 3), torch.randn(2, tokens, 24, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", MIXERS)
def test_padded_tokens_change_no_other(name):
    torch.manual_seed(0)
    layer, x = mixer(name, 24, 3).double().eval(), torch.randn(2, 16, 24).double()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 12:] = True
    other = x.clone()
    other[:, 12:] = torch.randn(2, 4, 24).double()
    a, b = layer(x, key_padding_mask=mask), layer(other, key_padding_mask=mask)
    torch.testing.assert_close(a[:, :12], b[:, :12])
    assert not torch.allclose(layer(x)[:, :12], layer(other)[:, :12])


def test_the_official_start():
    torch.manual_seed(0)
    layer = MTTT(48, 3)
    bound = math.sqrt(3 / 48)
    for w in (layer.phi.weight, layer.psi.weight, layer.h.weight, layer.g.weight):
        assert 0.95 * bound < w.abs().max() <= bound
    for w in (layer.inner["weight_1"], layer.inner["weight_2"]):
        assert 0.95 * math.sqrt(6 / 80) < w.abs().max() <= math.sqrt(6 / 80)
    assert not any(p.any() for n, p in layer.named_parameters() if "bias" in n or "shift" in n)
    assert (layer.g.scale == 1).all()
    zero = mixer("mttt-linear", 48, 3)
    assert not zero.inner["weight"].any()
    assert not zero.inner["weight"].requires_grad
    assert set(zero.inner) == {"weight"}
    fixed = MTTT(48, 3, w0="fixed")
    assert fixed.inner["weight_1"].any()
    assert not fixed.inner["weight_1"].requires_grad


def test_orders_are_drawn_in_training_and_fixed_in_evaluation():
    torch.manual_seed(0)
    layer, x = mixer("mttt-mlp-sgd4", 24, 3), torch.randn(2, 17, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state)
    other = copy.deepcopy(layer)
    other.seed = 1
    assert not torch.equal(layer(x), other(x))
    order = torch.arange(17)
    assert torch.equal(layer(x, order=order), layer.train()(x, order=order))
    layer = MTTT(24, 3, learner="linear", steps=2, sgd=True)
    compiled = torch.compile(layer.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*should not be instantiated")
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kwargs", [{"steps": 0}, {"differentiate": False}])
def test_gradients_are_zero_and_not_missing(kwargs):
    layer = MTTT(24, 3, learn_inner_lr=True, **kwargs)
    layer(torch.randn(2, 5, 24)).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        unused = name.startswith(("phi", "g.")) or (name == "inner_lr" and "steps" in kwargs)
        assert bool(p.grad.any()) != unused, name


def test_rates_can_be_learned():
    layer = MTTT(24, 3, steps=2, inner_lr=(1.0, 0.5), learn_inner_lr=True)
    assert layer.inner_lr.shape == (2, 3)
    assert layer.inner_lr[1, 0] == 0.5
    layer(torch.randn(2, 5, 24)).square().sum().backward()
    assert layer.inner_lr.grad.all()
    assert "inner_lr" in layer.no_weight_decay()
    assert "inner_lr" not in MTTT(24, 3).state_dict()


@pytest.mark.parametrize("name", ["mttt-linear", "mttt-mlp", "linear", "softmax"])
def test_official_parameters_go_in_and_out(name):
    torch.manual_seed(0)
    one, two, x = mixer(name, 24, 3), mixer(name, 24, 3), torch.randn(2, 5, 24)
    for p in one.parameters():
        nn.init.normal_(p, std=0.2)
    from_official(two, to_official(one))
    assert torch.equal(one(x), two(x))


def test_official_parameters_that_do_not_fit_are_refused():
    layer = MTTT(24, 3)
    official, before = to_official(layer), copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"missing \['g_bias'\], unknown \['more'\]"):
        from_official(layer, {("more" if n == "g_bias" else n): t for n, t in official.items()})
    with pytest.raises(ValueError, match=r"phi/kernel is \[2, 24, 8\]"):
        from_official(layer, {**official, "phi/kernel": torch.zeros(2, 24, 8)})
    assert all(torch.equal(before[n], t) for n, t in layer.state_dict().items())
    with pytest.raises(TypeError, match="Linear has no official"):
        to_official(nn.Linear(2, 2))


def test_the_official_recipe_decays_kernels_alone():
    layer = MTTT(24, 3)
    kernels = {view.own for name, view in layer.official().items() if name.endswith("kernel")}
    assert layer.no_weight_decay() == {n for n, _ in layer.named_parameters()} - kernels


def test_inner_losses_are_recorded_for_as_long_as_asked():
    torch.manual_seed(0)
    model = nn.Sequential(MTTT(24, 3, steps=2), nn.Linear(24, 24), ViTTT(24, 3))
    x = torch.randn(2, 9, 24)
    want = model(x)
    with record_inner(model, state=True) as record:
        got = model(x)
        model(x)
    assert torch.equal(got, want)
    assert {n: len(calls) for n, calls in record.items()} == {"0": 2, "2": 2}
    assert record["0"][0].losses.shape == (2, 3, 3)
    assert record["2"][0].losses.shape == (2, 4, 2)
    assert record["0"][0].state["weight_1"].shape == (2, 3, 8, 32)
    assert record["2"][0].state["w3"].shape == (16, 1, 3, 3)
    model(x)
    assert len(record["0"]) == 2
    with (
        pytest.raises(ValueError, match="Linear has no layer with an inner loop"),
        record_inner(nn.Linear(2, 2)),
    ):
        pass


def test_a_module_is_a_learner():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 8))
    layer, x = MTTT(24, 3, learner=net, steps=2), torch.randn(2, 5, 24)
    assert layer.inner["0/weight"].shape == (3, 5, 8)
    assert torch.equal(layer.inner["0/weight"][2], net[0].weight)
    layer(x).sum().backward()
    assert all(p.grad.any() for n, p in layer.named_parameters() if n != "h.bias")
    assert not any(n.startswith("_learner") for n in layer.state_dict())


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast):
    torch.manual_seed(0)
    layer, x = MTTT(24, 3), torch.randn(2, 5, 24)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), record_inner(layer) as record:
        y = layer(x) if autocast else layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert record[""][0].losses.dtype == torch.float32
    torch.testing.assert_close(y.float(), want, atol=0.05, rtol=0.05)


def test_vittt_takes_any_grid_and_gives_the_same_twice():
    torch.manual_seed(0)
    layer, x = ViTTT(24, 3, rope=True), torch.randn(2, 15, 24)
    y = layer(x, grid=(3, 5))
    assert torch.equal(y, layer(x, grid=(3, 5)))
    assert not torch.allclose(y, layer(x, grid=(5, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, grid=(3, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MTTT(24, 5), "5 heads do not divide a width of 24"),
        (lambda: MTTT(24, 3, steps=-1), "steps is -1"),
        (lambda: MTTT(24, 3, learner="mpl"), "no learner 'mpl'"),
        (lambda: MTTT(24, 3, learner="glu"), "layers.ViTTT"),
        (lambda: MTTT(24, 3, w0="one"), "w0 is 'one'"),
        (lambda: MTTT(24, 3, inner_lr=(1.0, 1.0)), "2 rates for 1 steps"),
        (lambda: MTTT(24, 3, learner=nn.Linear(8, 9))(torch.zeros(1, 2, 24)), "number and width"),
        (lambda: MTTT(24, 3, steps=3, sgd=True)(torch.zeros(1, 2, 24)), "2 tokens cannot be cut"),
        (lambda: ViTTT(24, 5), "5 heads do not divide"),
        (lambda: ViTTT(18, 3, rope=True), "multiple of 4"),
        (lambda: ViTTT(24, 3)(torch.zeros(1, 15, 24)), "15 tokens make no square"),
        (lambda: ViTTT(24, 3)(torch.zeros(1, 15, 24), grid=(4, 4)), "does not hold 15"),
        (lambda: LinearAttention(24, 3, "relu"), "feature_map is 'relu'"),
        (lambda: SoftmaxAttention(24, 0), "0 heads"),
        (lambda: mixer("mtt-mlp", 24, 3), "Did you mean 'mttt-mlp'"),
    ],
)
def test_what_cannot_be_built_is_said(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_zero_first_weights_under_a_layer_norm_are_warned_of():
    with pytest.warns(UserWarning, match="exact zero"):
        MTTT(24, 3, w0="zero")
