"""Many samples at once, each with weights of its own, against one after another."""

from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn

import testtime as tt
from testtime.adaptation import Method, Objective, select
from testtime.adaptation.objectives import entropy
from testtime.models import ResNetGN


def hand_made():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


MODELS = {
    "GroupNorm net": (hand_made, 16),
    "ResNet-26-GN": (lambda: ResNetGN(26), 32),
    "ViT": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2
        ),
        16,
    ),
    "ConvNeXt": (
        lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64)),
        32,
    ),
    "ResNet-18": (lambda: timm.create_model("resnet18", num_classes=10), 32),
}
# Adam would turn the rounding of a gradient that is nearly zero into whole steps.
PER_SAMPLE = tt.Tent(tt.SGD(0.05, momentum=0.9), statistics="source", steps=2)


def adapted(model, many, method=PER_SAMPLE, **options):
    return tt.adapt(model, method, episodic="sample", many=many, mean=0.0, std=1.0, **options)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_one_at_a_time(name, dtype, bar):
    torch.manual_seed(0)
    build, side = MODELS[name]
    model, x = build().to(dtype).eval(), torch.rand(16, 3, side, side, dtype=dtype)
    at_once = adapted(model, "vmap")
    answers = at_once(x)
    alone = torch.cat([adapted(model, "loop")(row) for row in x.split(1)])
    assert (answers - alone).abs().max() <= bar * alone.abs().max()
    assert not torch.allclose(answers, model(x), rtol=1e-3), "nothing was adapted"
    assert not at_once.report().said


@pytest.mark.parametrize("many", ["vmap", "loop"])
def test_one_sample_that_is_not_a_number_leaves_the_others(many):
    model, x = hand_made().eval(), torch.rand(6, 3, 16, 16)
    clean = adapted(model, many)(x)
    spoiled = x.clone()
    spoiled[2, 0, 0, 0] = float("nan")
    subject = adapted(model, many)
    subject(x)
    answers = subject(spoiled)
    others = [0, 1, 3, 4, 5]
    assert torch.allclose(answers[others], clean[others], rtol=1e-5, atol=1e-6)
    assert answers[2].isnan().all()
    assert subject.report().skipped == 1
    assert torch.allclose(subject(x), clean, rtol=1e-5, atol=1e-6)


def test_a_batch_larger_than_a_chunk():
    model, x = hand_made().double().eval(), torch.rand(37, 3, 16, 16, dtype=torch.float64)
    assert torch.allclose(adapted(model, "vmap")(x), adapted(model, "loop")(x), rtol=1e-10)


class Recurrent(nn.Module):
    """An LSTM has no batching rule."""

    def __init__(self):
        super().__init__()
        self.norm, self.lstm, self.head = nn.LayerNorm(6), nn.LSTM(6, 8, batch_first=True), None
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.lstm(self.norm(x))[0][:, -1])


def test_what_vmap_refuses_runs_one_after_another_and_says_so():
    model, x = Recurrent().eval(), torch.rand(5, 7, 6)
    subject = tt.adapt(model, PER_SAMPLE, episodic="sample")
    with pytest.warns(UserWarning, match="one after another: vmap refused"):
        answers = subject(x)
    assert torch.allclose(answers, adapted(model, "loop")(x), rtol=1e-5)
    subject(x)  # said once: a second warning would be an error


@dataclass(frozen=True)
class Everything(Method):
    """Entropy by all weights, with noise on the input: draws are shared by all samples."""

    optimizer: tt.SGD = tt.SGD(lr=1e-2, momentum=0.9)
    adapts = "everything"

    def select(self, module):
        return select.everything(module)

    def begin(self, net, x, draw):
        return {"seen": torch.zeros(()), "mean": torch.zeros(x.shape[1])}

    def loss(self, net, x, memory, draw):
        noise = draw("noise", lambda g: torch.randn(x.shape, generator=g, dtype=x.dtype))
        logits = net(x + 0.1 * noise)
        held = {"seen": memory["seen"] + 1, "mean": memory["mean"] + x.mean((0, 2, 3))}
        return Objective(loss=entropy(logits).mean(), memory=held)


def test_draws_and_memory_of_many_samples():
    model, x = hand_made().double().eval(), torch.rand(20, 3, 16, 16, dtype=torch.float64)
    method = Everything(steps=2)
    at_once, alone = adapted(model, "vmap", method)(x), adapted(model, "loop", method)(x)
    assert torch.allclose(at_once, alone, rtol=1e-10)


def test_whole_weight_matrices_run_one_after_another_on_a_cpu_and_say_so():
    subject = adapted(hand_made().eval(), "auto", Everything())
    with pytest.warns(UserWarning, match="with whole weight matrices changing"):
        subject(torch.rand(3, 3, 16, 16))


def test_the_state_is_as_it_began():
    model, x = hand_made().eval(), torch.rand(4, 3, 16, 16)
    for many in ("vmap", "loop"):
        subject = adapted(model, many)
        before = subject.snapshot()
        subject(x)
        after = subject.snapshot()
        for path, tensor in before.tensors().items():
            assert torch.equal(tensor, after.tensors()[path]), path
        assert after.batch == 1
