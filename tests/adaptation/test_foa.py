"""FOA: the tokens of vision transformers of every library, and the laws on them."""

import pytest
import torch
from torch import nn

from tests import operators  # noqa: F401 - before anything imports timm or torchvision

import timm  # isort: skip
import torchvision  # isort: skip
import transformers  # isort: skip

import testtime as tt
from tests.adaptation.test_adapted import LOOKS, Recorder
from testtime.adaptation import tokens
from testtime.models.tiny import randomised, tiny

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}


def timm_vit(**options):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SIZES, **options)
    vars(model).update(pretrained_cfg={}, default_cfg={})  # for any numbers as images
    return model


def torchvision_vit(**options):
    model = torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=5, **options)
    nn.init.normal_(model.heads[-1].weight)  # zeros as it comes
    return model


def hugging_face(kind="ViT", **options):
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=4,
        num_labels=5,
        **options,
    )
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def made(build):
    """Return a model whose answers hang on its input, and batches."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        model = randomised(build()).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.4)
        return model, list(torch.rand(3, 6, 3, 16, 16))


class Normalised(nn.Module):
    """A transformer within another module, normalisation first."""

    def __init__(self):
        super().__init__()
        self.network = timm_vit()

    def forward(self, x):
        return self.network((x - 0.5) / 0.5)


MODELS = {
    "timm": timm_vit,
    "torchvision": torchvision_vit,
    "Hugging Face": hugging_face,
    "DeiT": lambda: hugging_face("DeiT"),
    "within": Normalised,
    "registers": lambda: timm_vit(reg_tokens=2),
}
FEW = tt.FOA(prompts=2, popsize=4)


def by_hand(model, x, prompts):
    """Return the class token after each block, by the library's own parts."""
    if isinstance(model, Normalised):
        return by_hand(model.network, (x - 0.5) / 0.5, prompts)
    if isinstance(model, torchvision.models.VisionTransformer):
        patches = model._process_input(x)
        start = torch.cat([model.class_token.expand(len(x), 1, -1), patches], 1)
        t = start + model.encoder.pos_embedding
        blocks, norm = model.encoder.layers, model.encoder.ln
        firsts = [block.ln_1 for block in blocks]
    elif hasattr(model, "blocks"):
        t = model._pos_embed(model.patch_embed(x))
        blocks, norm, firsts = model.blocks, model.norm, [block.norm1 for block in model.blocks]
    else:
        base = model.base_model
        t, blocks, norm = base.embeddings(x), base.layers, base.layernorm
        firsts = [block.layernorm_before for block in blocks]
    t = torch.cat([t[:, :1], prompts.expand(len(x), -1, -1), t[:, 1:]], 1)
    found = []
    for block, after in zip(blocks, [*firsts[1:], norm], strict=True):
        t = block(t)
        found.append(after(t)[:, 0])
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_the_librarys_own_parts(name):
    model, (x, *_) = made(MODELS[name])
    net = tt.adapt(model, tt.Source()).learner.live
    place = tokens.find(FEW, net.module)
    prompts = torch.rand(2, 8)
    for given in (prompts, prompts[:0]):
        found, logits = tokens.features(net, x, place, given if len(given) else None)
        wanted = by_hand(model, x, given)
        assert torch.allclose(found, wanted, atol=1e-5)
        assert torch.allclose(logits, model.get_submodule(place.head)(wanted[:, -8:]), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_adapts_and_answers(name):
    model, batches = made(MODELS[name])
    adapted = tt.adapt(model, FEW, source=batches)
    logits = adapted.learner.logits_of
    first, second = (logits(adapted(x)) for x in batches[:2])
    assert first.shape == second.shape == (6, 5)
    assert not torch.allclose(second, logits(adapted.source(batches[1])), atol=1e-3)
    assert torch.equal(logits(adapted.predict(batches[1])), logits(adapted.predict(batches[1])))
    adapted.reset()
    assert torch.equal(logits(adapted(batches[0])), first)


VARIANTS = [FEW, tt.FOA.preset("shift"), tt.FOA.preset("bp")]
LAWS = [(law, m) for m in VARIANTS for law in tt.LAWS if m is FEW or law.number in (3, 4, 5, 12)]


@pytest.mark.parametrize(
    ("law", "method"), LAWS, ids=lambda value: getattr(value, "variant", str(value))
)
def test_law(law, method):
    law(method, *made(timm_vit))


@pytest.mark.parametrize("method", VARIANTS, ids=lambda method: method.variant)
def test_is_not_exported(method):
    model, batches = made(timm_vit)
    adapted = tt.adapt(model, method, source=batches).fit(batches)
    with pytest.raises(ValueError, match="FOA puts prompts and a shift into"):
        adapted.export(batches[0])


@pytest.mark.parametrize("method", VARIANTS[1:], ids=lambda method: method.variant)
def test_steps_are_alike_and_do_not_look(method):
    model, batches = made(timm_vit)
    adapted = tt.adapt(model, method, source=batches).fit(batches)
    runs = []
    for x in batches:
        with Recorder() as recorder:
            adapted(x)
        runs.append(recorder.seen)
    assert runs[0] == runs[1] == runs[2]
    assert [name for name, *_ in runs[0] if any(look in name for look in LOOKS)] == []


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: tiny("batchnorm2d")[0], "has no class token"),
        (lambda: tiny("transformer")[0], "has no class token"),
        (lambda: timm_vit(global_pool="avg", class_token=False), "has no class token"),
        (lambda: timm_vit(global_pool="avg", fc_norm=False), "reads something else .*mean of all"),
        (lambda: torchvision_vit(representation_size=6), "reads something else"),
        (lambda: hugging_face("Dinov2"), r"reads something else \(\[6, 16\]\)"),
        (
            lambda: hugging_face("Beit", use_relative_position_bias=True, use_mean_pooling=False),
            "puts 2 tokens more into the model, which does not take them",
        ),
    ],
)
def test_a_model_whose_tokens_cannot_be_reached_is_refused(build, said):
    model, batches = made(build)
    with pytest.raises(ValueError, match=said):
        tt.adapt(model, FEW, source=batches)(batches[0])


def test_refuses_one_image_and_one_source_image():
    model, batches = made(timm_vit)
    with pytest.raises(ValueError, match="FOA needs source data"):
        tt.adapt(model, "foa")
    with pytest.raises(ValueError, match="one alone was given"):
        tt.adapt(model, "foa", source=[batches[0][:1]])
    with pytest.raises(ValueError, match="batches of at least 2, but this one has 1"):
        tt.adapt(model, FEW, source=batches)(batches[0][:1])


def test_source_statistics_do_not_hang_on_batches():
    model, batches = made(timm_vit)
    every = torch.cat(batches)
    one, many = (
        tt.adapt(model, FEW, source=source).learner.constants
        for source in ([every], every.split([1, 7, 3, 7]))
    )
    for name in ("mean", "std"):
        assert torch.allclose(one[name], many[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tt.FOA("fao"), r"FOA\(variant='fao'\) is not known"),
        (lambda: tt.FOA("bp"), "'bp' alone descends, and needs one"),
        (lambda: tt.FOA(optimizer=tt.SGD(0.1)), "'bp' alone descends"),
        (lambda: tt.FOA(prompts=0), r"FOA\(prompts=0\): it must be at least 1"),
        (lambda: tt.FOA(popsize=3), r"FOA\(popsize=3\): it must be at least 4"),
    ],
)
def test_bad_hyper_parameters(make, said):
    with pytest.raises(ValueError, match=said):
        make()
