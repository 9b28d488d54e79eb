"""replace_attention on models of every kind."""

import copy
import warnings

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from testtime.layers import MTTT, LinearAttention, SoftmaxAttention, mixer, replace_attention
from testtime.models import ViT


def timm_vit(**kwargs):
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=5,
        **kwargs,
    )


def hugging_face(kind="ViT", **kwargs):
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        **kwargs,
    )
    return getattr(transformers, f"{kind}Model")(config)


MODELS = {
    "timm": timm_vit,
    "timm, registers": lambda: timm_vit(reg_tokens=2),
    "torchvision": lambda: torchvision.models.VisionTransformer(32, 8, 2, 3, 24, 48),
    "ViT": hugging_face,
    "DeiT": lambda: hugging_face("DeiT"),
    "Dinov2": lambda: hugging_face("Dinov2"),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(24, 3, 48, 0.0, batch_first=True), 2, enable_nested_tensor=False
    ),
    "own": lambda: ViT("softmax", image_size=32, patch_size=8, dim=24, depth=2, num_heads=3),
}


def answer(model, name):
    torch.manual_seed(1)
    x = torch.randn(2, 4, 24) if name == "encoder" else torch.randn(2, 3, 32, 32)
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_every_attention_is_replaced_and_the_model_still_runs(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    want = answer(model, name)
    # First by the same attention, taken over: nothing may change.
    same = replace_attention(copy.deepcopy(model), SoftmaxAttention)
    assert sum(isinstance(m, SoftmaxAttention) for m in same.modules()) == 2
    torch.testing.assert_close(answer(same, name), want, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="2 softmax attentions were replaced"):
        other = replace_attention(model, "mttt-mlp")
    assert other is model
    layers = [m for m in model.modules() if isinstance(m, MTTT)]
    assert len(layers) == 2
    assert not any(m.training for m in layers)
    y = answer(model, name)
    assert y.shape == want.shape
    y.sum().backward()
    assert all(p.grad is not None for m in layers for p in m.parameters())


def test_a_model_with_linear_attention_is_reproduced_exactly():
    torch.manual_seed(0)
    model = ViT("linear", image_size=32, patch_size=8, dim=24, depth=2, num_heads=3).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 3, 32, 32).double()
    want = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_attention(model, "mttt-linear")
    assert sum(isinstance(m, LinearAttention) for m in model.modules()) == 0
    assert want.abs().max() > 0.1
    torch.testing.assert_close(model(x), want, atol=1e-12, rtol=1e-12)


def test_where_chooses():
    for where in (r"blocks\.1\.", lambda name: name.startswith("blocks.1")):
        model = timm_vit()
        with pytest.warns(UserWarning, match="1 softmax"):
            replace_attention(model, "mttt-linear", where=where, init="fresh")
        assert [n for n, m in model.named_modules() if isinstance(m, MTTT)] == [
            "blocks.1.attn.mixer"
        ]


@pytest.mark.filterwarnings("ignore:.*softmax attentions")
def test_a_grid_is_for_tokens_that_have_a_place_on_it():
    before = timm_vit()
    with pytest.raises(ValueError, match="'cls_token', a token that has no place on the grid"):
        replace_attention(before, "vittt", init="fresh")
    assert not any("mixer" in n for n, _ in before.named_modules())
    model = timm_vit(class_token=False, global_pool="avg")
    replace_attention(model, "vittt", init="fresh")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: timm_vit(qk_norm=True), "'blocks.0.attn' has norms of queries and keys"),
        (lambda: timm_vit(scale_attn_norm=True), "a norm before its output"),
        (lambda: timm_vit(attn_drop_rate=0.1), "attention dropout"),
        (lambda: hugging_face(attention_probs_dropout_prob=0.1), "attention dropout"),
        (lambda: nn.MultiheadAttention(24, 3, add_bias_kv=True), "key and value biases"),
        (lambda: nn.MultiheadAttention(24, 3, kdim=8), "keys of another width"),
        (lambda: nn.TransformerDecoderLayer(24, 3, 48, 0.0), "'self_attn' has causal use"),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
            "WindowAttention, which may have relative positions",
        ),
        (
            lambda: timm.layers.attention.AttentionRope(24, 3),
            "AttentionRope, which may have relative positions, rotations",
        ),
        (lambda: mixer("linear-elu", 24, 3), "an elu feature map, a divisor from the data"),
        (lambda: nn.Linear(2, 2), "No attention to replace in Linear: it has none"),
    ],
)
def test_what_a_mixer_cannot_honour_is_refused_by_name(make, says):
    model = make()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=says):
        replace_attention(model, "mttt-linear")
    assert [type(m) for m in model.modules()] == before


def test_every_attention_is_checked_before_one_is_changed():
    model = timm_vit()
    model.blocks[1].attn.q_norm = nn.LayerNorm(8)
    with pytest.raises(ValueError, match=r"'blocks\.1\.attn'"):
        replace_attention(model, "mttt-linear")
    assert not any(isinstance(m, MTTT) for m in model.modules())


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"init": "zero"}, "init is 'zero'"),
        ({"where": "layers"}, r"under where='layers'; there are blocks\.0\.attn, blocks\.1\.attn"),
        ({"mixer": "mttt"}, "no mixer 'mttt'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(kwargs, says):
    with pytest.raises(ValueError, match=says):
        replace_attention(timm_vit(), **{"mixer": "mttt-mlp", **kwargs})


def test_weights_that_have_no_place_are_refused():
    with pytest.raises(ValueError, match="Linear has no place for the weights"):
        replace_attention(timm_vit(), lambda dim, heads: nn.Linear(dim, dim))


@pytest.mark.filterwarnings("ignore:.*softmax attentions")
class TestCalledAsPyTorchCallsAttention:
    @pytest.fixture
    def layer(self):
        torch.manual_seed(0)
        return replace_attention(nn.MultiheadAttention(24, 3, batch_first=True), "mttt-mlp")

    def test_padding_masks_are_honoured(self, layer):
        x, mask = torch.randn(2, 5, 24), torch.zeros(2, 5, dtype=torch.bool)
        mask[:, 3:] = True
        y, weights = layer(x, x, x, key_padding_mask=mask)
        assert weights is None
        torch.testing.assert_close(y[:, :3], layer.mixer(x[:, :3]))
        added = torch.zeros(2, 5).masked_fill(mask, -torch.inf)
        assert torch.equal(layer(x, x, x, key_padding_mask=added)[0], y)

    def test_an_encoder_makes_no_nested_tensors_for_it(self):
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=True)
        encoder = replace_attention(nn.TransformerEncoder(block, 2).eval(), "mttt-mlp")
        x, mask = torch.randn(2, 5, 24), torch.zeros(2, 5, dtype=torch.bool)
        mask[:, 3:] = True
        with torch.no_grad():
            y = encoder(x, src_key_padding_mask=mask)
            torch.testing.assert_close(y[:, :3], encoder(x[:, :3]))

    def test_what_only_attention_can_do_is_refused(self, layer):
        x = torch.randn(2, 5, 24)
        with pytest.raises(ValueError, match="cannot honour attn_mask"):
            layer(x, x, x, attn_mask=torch.zeros(5, 5))
        with pytest.raises(ValueError, match="cannot honour is_causal"):
            layer(x, x, x, is_causal=True)
        with pytest.raises(ValueError, match="must be the same tensor"):
            layer(x, x.clone(), x)
        with pytest.raises(ValueError, match="add a dimension"):
            layer(*[x[0]] * 3)
        with pytest.raises(ValueError, match="other values than 0 and -inf"):
            layer(x, x, x, key_padding_mask=torch.ones(2, 5))

    def test_tokens_may_come_first(self):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(24, 3)
        first = replace_attention(attention, SoftmaxAttention)
        x = torch.randn(5, 2, 24)
        torch.testing.assert_close(first(x, x, x)[0], attention(x, x, x)[0])
