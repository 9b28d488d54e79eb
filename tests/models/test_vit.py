"""The vision transformers: sizes, counts, starts, official names, bad input."""

import pytest
import torch
from torch import nn

from testtime.layers import MTTT, from_official, to_official
from testtime.models import HViT3, ViT, ViT3, count_flops
from testtime.models.vit import SIZES, sincos2d


def parameters(model, every=False):
    """Return how many are trained; the tables of positions are left out, as published."""
    named = model.named_parameters()
    return sum(p.numel() for n, p in named if n != "pos_embed" and (every or p.requires_grad))


# Counted from the authors' models, and GFLOPs of a forward as their formulas give them.
PUBLISHED = {
    ("tiny", 16, "softmax"): (5_716_456, 2.49),
    ("tiny", 16, "linear"): (5_716_456, 2.25),
    ("tiny", 16, "linear-elu"): (5_716_456, 2.25),
    ("tiny", 16, "mttt-linear"): (5_716_456, 2.49),
    ("tiny", 16, "mttt-mlp"): (6_921_448, 3.9),
    ("tiny", 1, "linear"): (5_569_576, 562),
    ("tiny", 1, "mttt-linear"): (5_569_576, 622),
    ("tiny", 1, "mttt-mlp"): (6_774_568, 991),
    ("tiny", 1, "mttt-mlp-sgd4"): (6_774_568, 991),
    ("small", 16, "softmax"): (22_122_472, 9.2),
    ("small", 16, "linear"): (22_122_472, 8.7),
    ("small", 16, "mttt-linear"): (22_122_472, 9.5),
    ("small", 16, "mttt-mlp"): (24_560_104, 12.4),
    ("small", 1, "softmax"): (21_828_712, 48_500),
    ("small", 1, "linear"): (21_828_712, 2_190),
    ("small", 1, "mttt-linear"): (21_828_712, 2_400),
    ("small", 1, "mttt-mlp"): (24_266_344, 3_140),
}


@pytest.fixture
def no_start():
    """Build on a device without data: initial values cost most of the time."""
    with torch.device("meta"):
        yield


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(("size", "patch", "mixer"), PUBLISHED)
def test_published_sizes(size, patch, mixer):
    count, flops = PUBLISHED[size, patch, mixer]
    model = ViT.sized(size, mixer, patch_size=patch)
    assert parameters(model) == count
    assert count_flops(model) / 1e9 == pytest.approx(flops, rel=0.01)


@pytest.mark.usefixtures("no_start")
def test_the_frozen_first_weights_are_counted_apart():
    assert parameters(ViT.sized("tiny", "mttt-linear"), every=True) == 5_863_912
    assert parameters(ViT.sized("small", "mttt-linear"), every=True) == 22_417_384


def test_flops_by_the_formulas():
    # The whole network by hand: n tokens, width d, heads of p, 12 blocks.
    n, d, p = 196, 192, 64
    rest = 12 * 16 * n * d * d + 2 * n * d * 768 + 2 * d * d + 2000 * d
    for mixer, layer in {
        "softmax": 8 * n * d * d + 4 * n * n * d,
        "linear": 8 * n * d * d + 4 * n * d * p,
        "mttt-linear": 10 * n * d * d + 6 * n * d * p,
        "mttt-mlp": 10 * n * d * d + 56 * n * d * p,
        "mttt-mlp-sgd4": 10 * n * d * d + 56 * n * d * p,
    }.items():
        with torch.device("meta"):
            assert count_flops(ViT.sized("tiny", mixer)) == 12 * layer + rest
    steps = MTTT(d, 3, steps=3)
    assert steps.flops(n) == 6 * n * d * d + 16 * n * d * p + 3 * (4 * n * d * d + 40 * n * d * p)
    assert MTTT(d, 3, steps=0).flops(n) == 4 * n * d * d + 16 * n * d * p
    official = MTTT(d, 3, steps=6, max_steps=4)
    assert official.flops(n) == MTTT(d, 3, steps=4).flops(n)


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(
    ("build", "size", "millions", "giga"),
    [
        (ViT3, "tiny", 6.15, 1.22),
        (ViT3, "small", 23.8, 4.81),
        (ViT3, "base", 90.1, 17.9),
        (HViT3, "tiny", 28.7, 4.91),
        (HViT3, "small", 54.4, 8.74),
        (HViT3, "base", 94.4, 16.7),
    ],
)
def test_published_sizes_of_vit3(build, size, millions, giga):
    model = build.sized(size)
    assert parameters(model) / 1e6 == pytest.approx(millions, rel=2e-3)
    assert count_flops(model) / 2e9 == pytest.approx(giga, rel=3e-3)


def test_counting_leaves_the_model_alone_and_refuses_what_it_does_not_know():
    model = ViT("mttt-mlp", image_size=32, patch_size=8, dim=24, depth=1, num_heads=3)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert count_flops(model, 32) > 0
    assert model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with pytest.raises(TypeError, match="MultiheadAttention"):
        count_flops(nn.TransformerEncoderLayer(24, 3))


def small(mixer="mttt-mlp", **kwargs):
    arguments = {"image_size": 32, "patch_size": 8, "dim": 24, "depth": 2, "num_heads": 3}
    return ViT(mixer, **{**arguments, "num_classes": 5, **kwargs})


@pytest.mark.parametrize("mixer", ["softmax", "linear", "linear-elu", "mttt-linear", "vittt"])
@pytest.mark.parametrize("patch", [8, 16])
def test_every_mixer_trains(mixer, patch):
    torch.manual_seed(0)
    model = small(mixer, patch_size=patch, image_size=(32, 16))
    nn.init.normal_(model.head.weight)
    logits = model(torch.randn(2, 3, 32, 16))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_official_start():
    torch.manual_seed(0)
    model = small(dim=192, num_classes=10)
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    with torch.no_grad():
        for layer in (model.patch_embed, model.pre_logits):
            assert float(layer.weight.std()) == pytest.approx(192**-0.5, rel=0.02)
    first = model.blocks[0].mlp.fc1
    bound = (6 / (5 * 192)) ** 0.5
    assert 0.99 * bound < first.weight.abs().max() <= bound
    assert 0 < first.bias.abs().max() < 1e-5
    assert "pos_embed" not in model.state_dict()
    pixels = small(patch_size=1, dim=192)
    assert pixels.pos_embed.shape == (1, 1024, 192)
    assert float(pixels.pos_embed.detach().std()) == pytest.approx(192**-0.5, rel=0.02)


def test_the_table_of_positions():
    table = sincos2d((2, 3), 8)
    assert table.shape == (1, 6, 8)
    assert table.dtype == torch.float32
    # Token 5 lies in row 1 and column 2; the second frequency is 1 / 10000.
    sin, cos = torch.sin, torch.cos
    f = torch.tensor([1, 1e-4], dtype=torch.float64)
    want = torch.cat([sin(2 * f), cos(2 * f), sin(f), cos(f)]).float()
    assert torch.equal(table[0, 5], want)


@pytest.mark.parametrize("mixer", ["softmax", "linear", "mttt-linear", "mttt-mlp"])
def test_official_parameters_go_in_and_out(mixer):
    torch.manual_seed(0)
    one, two, x = small(mixer, pos_embed="learn"), small(mixer, pos_embed="learn"), None
    for p in one.parameters():
        nn.init.normal_(p, std=0.2)
    official = to_official(one)
    assert official["embedding/kernel"].shape == (8, 8, 3, 24)
    assert official["Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel"].shape == (24, 96)
    from_official(two, official)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(one(x), two(x))


def test_vittt_has_no_names_in_the_jax_code():
    with pytest.raises(TypeError, match="ViTTT has no parameter names"):
        to_official(small("vittt"))


def test_the_official_recipe_decays_kernels_alone():
    model = small()
    kernels = {v.own for name, v in model.official().items() if name.endswith("kernel")}
    assert model.no_weight_decay() == {n for n, _ in model.named_parameters()} - kernels


def test_an_image_alone_equals_the_image_in_a_batch():
    torch.manual_seed(0)
    for model in (small("mttt-mlp"), ViT3(24, 2, 3, 8), HViT3((8, 16), (1, 1), (1, 2))):
        model = model.double().eval()
        if isinstance(model, ViT):
            nn.init.normal_(model.head.weight)
        x = torch.randn(3, 3, 32, 32).double()
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


def test_vit3_takes_grids_that_are_not_square():
    assert ViT3(24, 1, 3, 8, num_classes=5)(torch.randn(2, 3, 32, 16)).shape == (2, 5)
    model = HViT3((8, 16), (1, 1), (1, 2), num_classes=5, drop_path=0.5)
    assert model(torch.randn(2, 3, 36, 20)).shape == (2, 5)


def test_stochastic_depth_keeps_the_mean_and_rests_in_evaluation():
    torch.manual_seed(0)
    model = ViT3(24, 2, 3, 8, num_classes=5, drop_path=0.9)
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    block = model.train().blocks[1]
    kept = block._drop(torch.ones(4000, 1, 1))
    assert kept.unique().tolist() == pytest.approx([0.0, 10.0])
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: small(patch_size=7), "Patches of 7 do not divide"),
        (lambda: small(pos_embed="rope"), "pos_embed is 'rope'"),
        (lambda: small(dim=18), "width of 18 has no table"),
        (lambda: small(num_heads=5), "5 heads do not divide"),
        (lambda: small("mtt-mlp"), "Did you mean 'mttt-mlp'"),
        (lambda: small()(torch.zeros(1, 3, 32, 24)), "the model is built for"),
        (lambda: ViT.sized("tinny"), "Did you mean 'tiny'"),
        (lambda: ViT3.sized("large"), "no size 'large'"),
        (lambda: HViT3((6,), (1,), (1,)), "multiple of 4"),
    ],
)
def test_what_cannot_be_built_is_said(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_sizes_are_the_published_ones():
    assert set(SIZES) == {"tiny", "small"}
