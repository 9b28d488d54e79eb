"""What the methods do beyond their recordings."""

import pytest
import torch
from torch import nn

import testtime as tt


def net(dropout=0.5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(6),
        nn.Linear(6, 4),
    ).eval()


def modes(adapted):
    """Return which modules are in train mode when they are called."""
    seen = set()
    for name, module in adapted.learner.module.named_modules():
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.add(name) if module.training else None
        )
    adapted(torch.rand(8, 3, 6, 6))
    return seen


@pytest.mark.parametrize("variant", ["batch", "mix", "cumulative"])
def test_bn_puts_nothing_in_train_mode(variant):
    assert modes(tt.adapt(net(), tt.BNAdapt(variant))) == set()


def test_bn_official_and_moving_put_their_own_layers_in_train_mode():
    assert modes(tt.adapt(net(), tt.BNAdapt.preset("official"))) == {"1"}
    assert modes(tt.adapt(net(), tt.BNAdapt("moving"))) == {"1", "5"}


def test_tent_keeps_dropout_off_but_under_official():
    assert modes(tt.adapt(net(), tt.Tent())) == set()
    assert "2" in modes(tt.adapt(net(), tt.Tent.preset("official")))


def test_officials_dropout_draws_from_the_adapted_models_own_generator():
    model, x = net(), torch.rand(8, 3, 6, 6)
    before = torch.get_rng_state()
    one, two = (tt.adapt(model, tt.Tent.preset("official"), seed=3) for _ in range(2))
    first = one(x)
    torch.rand(5)
    assert torch.equal(two(x), first)
    one.reset()
    assert torch.equal(one(x), first)
    torch.set_rng_state(before)


def test_one_value_a_channel_takes_the_sources_variance():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    layer, x = model[1], torch.rand(1, 5)
    answer = tt.adapt(model, tt.BNAdapt("mix", prior=0.25))(x)
    h = model[0](x)
    mean = 0.25 * layer.running_mean + 0.75 * h[0]
    normal = (h - mean) / (layer.running_var + layer.eps).sqrt() * layer.weight + layer.bias
    assert torch.allclose(answer, model[2](normal), atol=1e-6)


def test_a_source_counted_in_images():
    model, x = net(), torch.rand(12, 3, 6, 6)
    counted = tt.adapt(model, tt.BNAdapt("mix", source_size=4))(x)
    assert torch.equal(counted, tt.adapt(model, tt.BNAdapt("mix", prior=0.25))(x))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tt.Tent(steps=0), r"Tent\(steps=0\): it must be a whole number of at least 1"),
        (lambda: tt.Tent(reset_every=-1), "reset_every=-1"),
        (lambda: tt.BNAdapt("mix", prior=1.5), "a weight between 0 and 1"),
        (lambda: tt.BNAdapt("mixed"), r"BNAdapt\(variant='mixed'\) is not known"),
        (lambda: tt.Tent.preset("offical"), "no preset 'offical'.* Did you mean 'official'"),
    ],
)
def test_bad_hyper_parameters(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_method_shows_what_is_not_its_default():
    assert repr(tt.Tent()) == "Tent()"
    assert repr(tt.Tent(steps=2, layers=(nn.LayerNorm,))) == "Tent(steps=2, layers=(LayerNorm,))"
    assert tt.Tent().configuration()["layers"] == "(BatchNorm, InstanceNorm, GroupNorm, LayerNorm)"
