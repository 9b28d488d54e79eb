"""The classifier is found in models of every library, or the reason is said why not."""

import re

import pytest
import torch
from torch import nn

from tests import operators  # noqa: F401 - before anything imports timm or torchvision

import timm  # isort: skip
import torchvision  # isort: skip
import transformers  # isort: skip

import testtime as tt
from testtime.adaptation import heads
from testtime.models.tiny import tiny


def hugging_face_vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config)


def hugging_face_resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5, layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
MODELS = {
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT), "head"),
    "timm resnet": (lambda: timm.create_model("resnet10t", num_classes=5), "fc"),
    "timm convnext": (
        lambda: timm.create_model(
            "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=5
        ),
        "head.fc",
    ),
    "torchvision mobilenet": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
        "classifier.3",
    ),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5),
        "heads.head",
    ),
    "Hugging Face vit": (hugging_face_vit, "classifier"),
    "Hugging Face resnet": (hugging_face_resnet, "classifier.1"),
    "tiny": (lambda: tiny("batchnorm2d")[0], "8"),
}


@pytest.fixture(params=MODELS)
def model_and_head(request):
    torch.manual_seed(0)
    build, head = MODELS[request.param]
    return build().eval(), head


def test_found_in_models_of_every_library(model_and_head):
    model, head = model_and_head
    x = torch.rand(4, 3, 32, 32)
    seen = []
    model.get_submodule(head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    adapted = tt.adapt(model, tt.T3A(), mean=0.0, std=1.0)
    net = adapted.learner.live
    assert heads.find(adapted.method, net.module) == head
    adapted(x)  # the output is the logits, or this would be refused
    features, logits = heads.features(tt.adapt(model, tt.Source()).learner.live, x, head)
    expected = adapted.learner.logits_of(model(x))
    assert torch.allclose(features, seen[-1], atol=1e-5)  # fused kernels round otherwise
    assert torch.allclose(logits, expected, atol=1e-6)
    assert torch.allclose(model.get_submodule(head)(features), expected, atol=1e-6)


class Backwards(nn.Module):
    """Registers its classifier before its backbone."""

    def __init__(self, temperature=None):
        super().__init__()
        self.classifier, self.backbone = nn.Linear(8, 5), nn.Linear(10, 8)
        self.temperature = temperature

    def forward(self, x):
        logits = self.classifier(self.backbone(x).relu())
        return logits if self.temperature is None else logits / self.temperature


def test_the_wrong_one_is_refused_and_the_right_one_named():
    model, x = Backwards(), torch.rand(4, 10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = tt.adapt(model, tt.T3A(), mean=0.0, std=1.0)
    start = adapted.snapshot()
    with pytest.raises(ValueError, match=r"'backbone' are not .* Pass head='classifier'"):
        adapted(x)
    assert adapted.snapshot().batch == start.batch
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert tt.adapt(model, tt.T3A(head="classifier"))(x).shape == (4, 5)


@pytest.mark.parametrize(
    ("model", "method", "said"),
    [
        (Backwards(2.0), tt.T3A(head="classifier"), "'classifier' are not the logits: no Linear"),
        (Backwards(), tt.T3A(head="fc"), "no Linear layer 'fc' in this one .*classifier, backbone"),
        (nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten()), tt.T3A(), "no Linear layer in this one"),
        (nn.Linear(10, 5), tt.T3A(head="1"), "no Linear layer '1'"),
    ],
)
def test_a_model_without_a_classifier_is_refused(model, method, said):
    x = torch.rand(4, 3, 1, 1) if isinstance(model, nn.Sequential) else torch.rand(4, 10)
    with pytest.raises(ValueError, match=said):
        tt.adapt(model, method)(x)


class Sequences(nn.Module):
    """A classifier on every place of a sequence."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        return self.head(x).transpose(1, 2)


def test_dense_logits_are_refused():
    with pytest.raises(ValueError, match=re.escape("'head' are not the logits")):
        tt.adapt(Sequences(), tt.T3A())(torch.rand(4, 7, 10))


def test_features_within_vmap():
    model, batches = tiny("groupnorm")
    at_once = tt.adapt(model, tt.T3A(), episodic="sample", many="vmap")(batches[0])
    alone = tt.adapt(model, tt.T3A(), episodic="sample", many="loop")(batches[0])
    assert torch.allclose(at_once, alone, rtol=1e-5, atol=1e-6)
