"""Beyond one label an image: pixels, several labels, several heads, regression, signals, tables."""

import math

import pytest
import torch
from torch import nn

import testtime as tt
from testtime.adaptation import objectives
from testtime.models.tiny import perceptron, randomised, tiny

# Objectives take dense logits, as they take one pixel after another.

DENSE = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
OBJECTIVES = {
    "entropy": objectives.entropy,
    "opinion": objectives.OpinionEntropy(),
    "opinion of mass 1000": objectives.OpinionEntropy(1000.0),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_objectives_of_dense_logits_against_a_loop_over_pixels(objective):
    whole = objective(DENSE)
    assert whole.shape == (2, 3, 4)
    for i in range(3):
        for j in range(4):
            assert torch.allclose(whole[:, i, j], objective(DENSE[:, :, i, j]), atol=1e-6)


def made(model, *shape, batches=3):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = randomised(model()).eval()
    return model, [torch.rand(8, *shape, generator=generator) for _ in range(batches)]


def segmenter(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


PLACES = [(i, j) for i in range(6) for j in range(6)]


@pytest.mark.parametrize("entropy", [objectives.entropy, objectives.OpinionEntropy()])
def test_tent_on_pixels(entropy):
    model, (x, *_) = made(segmenter, 3, 6, 6)
    adapted = tt.adapt(model, tt.Tent(entropy=entropy))
    logits = adapted(x)
    pixels = [float(entropy(logits[b : b + 1, :, i, j])) for b in range(8) for i, j in PLACES]
    assert logits.shape == (8, 4, 6, 6)
    assert float(adapted.notes["loss"][0]) == pytest.approx(sum(pixels) / len(pixels), rel=1e-5)


def test_sar_on_pixels_takes_each_as_reliable_or_not():
    model, (x, *_) = made(lambda: segmenter(lambda c: nn.GroupNorm(2, c)), 3, 6, 6)
    with torch.no_grad():
        model[3].weight.mul_(4)  # some pixels are sure
    adapted = tt.adapt(model, tt.SAR())
    adapted(x)
    notes = {k: v[0] for k, v in adapted.notes.items()}
    source, kept = model(x).detach(), []
    for b in range(8):
        for i, j in PLACES:
            here = float(objectives.entropy(source[b : b + 1, :, i, j]))
            sharp = float(objectives.entropy(notes["sharpest_logits"][b : b + 1, :, i, j]))
            assert bool(notes["reliable"][b, i, j]) == (here < 0.4 * math.log(4))
            if max(here, sharp) < 0.4 * math.log(4):
                kept.append(sharp)
    assert 0 < len(kept) < 8 * 36
    assert float(notes["loss"]) == pytest.approx(sum(kept) / len(kept), rel=1e-4)


@pytest.mark.parametrize("method", ["bn", "tent", "sar", "actmad"])
@pytest.mark.filterwarnings("ignore:.* stay as they are:UserWarning")
def test_a_segmentation_network_adapts(method):
    model, batches = made(segmenter, 3, 6, 6)
    adapted = tt.adapt(model, method, source=batches)
    adapted(batches[0])
    assert not torch.allclose(adapted(batches[1]), model(batches[1]), atol=1e-4)


@pytest.mark.parametrize("method", ["t3a", "lame", "foa"])
def test_a_segmentation_network_has_no_classifier(method):
    model, batches = made(segmenter, 3, 6, 6)
    with pytest.raises(ValueError, match=r"needs the classifier|needs a vision transformer"):
        tt.adapt(model, method, source=batches)


# Several labels an image, and several heads.


@pytest.mark.parametrize("method", ["tent", "sar", tt.Tent(entropy=objectives.OpinionEntropy())])
def test_the_probabilities_of_several_labels_are_refused(method):
    model, batches = made(lambda: nn.Sequential(tiny("batchnorm2d")[0], nn.Sigmoid()), 3, 8, 8)
    adapted = tt.adapt(model, method)
    with pytest.raises(ValueError, match="out of a sigmoid: they are several labels an image"):
        adapted(batches[0])
    assert adapted.report().batches == 0


def test_probabilities_of_classes_are_refused():
    model, batches = made(lambda: nn.Sequential(tiny("batchnorm2d")[0], nn.Softmax(1)), 3, 8, 8)
    with pytest.raises(ValueError, match="out of a softmax, so they are probabilities"):
        tt.adapt(model, "tent")(batches[0])
    model[1] = nn.LogSoftmax(1)  # whose softmax is what it was before
    assert tt.adapt(model, "tent")(batches[0]).shape == (8, 5)


@pytest.mark.parametrize("task", ["multi_label_classification", "regression"])
def test_a_hugging_face_model_says_what_it_is_for(task):
    from tests.adaptation.test_heads import hugging_face_resnet

    model = hugging_face_resnet()
    model.config.problem_type = task
    for method in ("tent", "sar"):
        with pytest.raises(ValueError, match=f"problem_type='{task}'"):
            tt.adapt(model, method)
    assert tt.adapt(model, "bn")(torch.rand(4, 3, 32, 32)).logits.shape == (4, 5)


def test_labels_as_two_classes_each_against_a_loop_over_labels():
    model, (x, *_) = tiny("batchnorm2d")
    adapted = tt.adapt(model, "tent", logits=lambda z: torch.stack([z, -z], 1) / 2)
    answer = adapted(x)
    assert answer.shape == (6, 2, 5)
    labels = []
    for label in range(5):
        p = (answer[:, 0, label] - answer[:, 1, label]).sigmoid()
        labels.append(float((-p * p.log() - (1 - p) * (1 - p).log()).mean()))
    assert float(adapted.notes["loss"][0]) == pytest.approx(sum(labels) / 5, rel=1e-4)


class TwoHeads(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.body, self.pack = tiny("batchnorm2d")[0][:8], pack
        self.kind, self.colour = nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x):
        features = self.body(x)
        return self.pack(self.kind(features), self.colour(features))


@pytest.mark.parametrize("method", ["tent", "sar", "t3a"])
@pytest.mark.parametrize(
    ("pack", "where"),
    [(lambda a, b: (a, b), 0), (lambda a, b: {"kind": a, "colour": b}, "kind")],
    ids=["tuple", "dict"],
)
def test_of_several_heads_one_must_be_chosen(pack, where, method):
    model, batches = made(lambda: TwoHeads(pack), 3, 8, 8)
    if method == "t3a":
        method = tt.T3A(head="kind")
    with pytest.raises(TypeError, match="Pass logits= with a key, an index or a function"):
        tt.adapt(model, method)(batches[0])
    answer = tt.adapt(model, method, logits=where)(batches[0])
    assert answer[where].shape == (8, 5)


# Regression.


def regression():
    return nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


@pytest.mark.parametrize("method", ["tent", "sar", "t3a", "lame"])
def test_a_regression_model_is_refused_where_classes_are_needed(method):
    model, batches = made(regression, 10)
    with pytest.raises(ValueError, match=r"one class alone|has one output"):
        tt.adapt(model, method)(batches[0])


@pytest.mark.parametrize("method", ["bn", "actmad"])
@pytest.mark.filterwarnings("ignore:.* stay as they are:UserWarning")
def test_a_regression_model_adapts_by_its_activations(method):
    model, batches = made(regression, 10)
    shifted = [3 * x + 1 for x in batches]
    adapted = tt.adapt(model, method, source=batches)
    right = model(batches[2]).mean()
    apart = [(f(shifted[2]).mean() - right).abs() for f in (model, adapted)]
    assert apart[1] < apart[0]
    assert adapted(shifted[0]).shape == (8, 1)


# Signals and tables, by the same three lines.


def signals():
    """Return a network for electrocardiograms of 128 values, as for beats of the MIT-BIH set."""
    return nn.Sequential(
        *(nn.Conv1d(1, 8, 7, stride=2, padding=3), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.Conv1d(8, 8, 5, stride=2, padding=2), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


@pytest.mark.parametrize("method", ["bn", "tent", "sar", "actmad", "t3a", "lame"])
@pytest.mark.parametrize(
    ("model", "shape"), [(signals, (1, 128)), (perceptron, (10,))], ids=["signals", "tables"]
)
@pytest.mark.filterwarnings("ignore:.* stay as they are:UserWarning")
def test_signals_and_tables_adapt(model, shape, method):
    model, batches = made(model, *shape)
    adapted = tt.adapt(model, method, source=batches)
    first = adapted(batches[0])
    second = adapted(batches[1])
    adapted.reset()
    assert torch.equal(adapted(batches[0]), first)
    assert not torch.allclose(second, model(batches[1]), atol=1e-4)


@pytest.mark.parametrize("method", ["cotta", "foa"])
@pytest.mark.parametrize(
    ("model", "shape"), [(signals, (1, 128)), (perceptron, (10,))], ids=["signals", "tables"]
)
def test_signals_and_tables_are_no_images(model, shape, method):
    model, batches = made(model, *shape)
    with pytest.raises(ValueError, match=r"augments colour images|needs a vision transformer"):
        tt.adapt(model, method, source=batches)(batches[0])


# Statistics of the source are computed once.


@pytest.mark.filterwarnings("ignore:.* stay as they are:UserWarning")
def test_source_statistics_are_saved_to_a_file(tmp_path):
    model, batches = made(signals, 1, 128)
    adapted = tt.adapt(model, "actmad", source=batches)
    adapted.save_source(tmp_path / "source.safetensors")
    again = tt.adapt(model, "actmad", source=tmp_path / "source.safetensors")
    assert torch.equal(again(batches[0]), adapted(batches[0]))
    other = made(lambda: nn.Sequential(*signals()[:-1], nn.Linear(8, 4)), 1, 128)[0]
    with pytest.raises(ValueError, match=r"source\.safetensors"):
        tt.adapt(other, "actmad", source=tmp_path / "source.safetensors")
