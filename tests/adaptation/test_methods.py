"""What the methods do beyond their recordings."""

import itertools

import pytest
import torch
from torch import nn

import testtime as tt
from testtime.adaptation.objectives import entropy
from testtime.models.tiny import tiny


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
        (lambda: tt.LAME("kNN"), r"LAME\(affinity='kNN'\) is not known: use 'knn', 'rbf'"),
        (lambda: tt.LAME(k=0), r"LAME\(k=0\)"),
        (lambda: tt.T3A(filter_k=-1), r"T3A\(filter_k=-1\): .* T3A.preset\('unfiltered'\)"),
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


def by_hand(features, labels, entropies, k, classes):
    """Return T3A's prototypes, class by class."""
    columns = []
    for c in range(classes):
        rows = sorted(
            (i for i, label in enumerate(labels) if label == c), key=lambda i: entropies[i]
        )
        total = sum((features[i] / features[i].norm() for i in rows[:k]), torch.zeros(8))
        columns.append(total / total.norm().clamp(min=1e-12))
    return torch.stack(columns)


def test_t3a_against_a_loop_over_classes():
    model, batches = tiny("groupnorm")
    adapted, head = tt.adapt(model, tt.T3A(filter_k=2)), model[8]
    seen = head.weight.detach()
    for x in batches:
        answer = adapted(x)
        features = model[:8](x).detach()
        seen = torch.cat([seen, features])
        logits = head(seen).detach()
        wanted = by_hand(seen, logits.argmax(1).tolist(), entropy(logits).tolist(), 2, 5)
        assert torch.allclose(answer, features @ wanted.T, atol=1e-5)
        assert torch.allclose(adapted.predict(x), answer, atol=1e-5)
    assert len(adapted.learner.state.memory["labels"]) == 10


def test_t3a_unfiltered_loses_the_last_support_of_each_class():
    rows = {
        "features": torch.arange(6.0)[:, None],
        "labels": torch.tensor([1, 0, 1, 1, 2, 3]),  # of three classes: the last is no row
        "entropies": torch.tensor([0.3, 0.1, 0.2, 0.4, 0.5, torch.inf]),
    }
    kept = tt.T3A(filter_k=2).filtered(rows, 3)
    assert kept["features"].flatten().tolist() == [1, 2, 0, 4, 0, 0]
    assert kept["labels"].tolist() == [0, 1, 1, 2, 3, 3]
    kept = tt.T3A(filter_k=2, loses_last=True).filtered(rows, 3)
    assert kept["labels"].tolist() == [1, 1, 3, 3, 3, 3]
    assert kept["entropies"][:2].tolist() == pytest.approx([0.2, 0.3])
    assert kept["entropies"][2:].isinf().all()


def test_t3a_exports_as_the_model_with_another_classifier():
    model, batches = tiny("batchnorm2d")
    adapted = tt.adapt(model, tt.T3A()).fit(batches)
    module, gap = adapted.export(batches[0])
    assert gap == 0
    assert torch.equal(module(batches[0]), adapted.predict(batches[0]))
    assert not module[8].bias.any()


def test_a_parametrised_classifier_is_refused_by_t3a():
    model = nn.Sequential(nn.Linear(10, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 5)))
    with pytest.raises(ValueError, match="the weight of '1', but that is computed from"):
        tt.adapt(model, "t3a")


def test_half_precision_ties_do_not_decide():
    model, batches = tiny("groupnorm")
    adapted = tt.adapt(model.bfloat16(), "t3a")
    assert adapted(batches[0].bfloat16()).dtype == torch.bfloat16
    assert adapted.learner.state.memory["entropies"].dtype == torch.float32


def lame_by_hand(features, probs, affinity, k):
    """Return LAME's predictions and the energy that they minimise, row by row."""
    g = [f / f.norm() for f in features]
    rows = range(len(g))
    d = torch.tensor([[float((g[i] - g[j]).norm()) for j in rows] for i in rows])
    if affinity == "rbf":
        width = sum(float(d[i].sort().values[min(k, len(g)) - 1]) for i in rows) / len(g)
        kernel = torch.exp(-(d**2) / (2 * width**2))
    elif affinity == "linear":
        kernel = torch.tensor([[float(g[i] @ g[j]) for j in rows] for i in rows])
    else:
        kernel = torch.zeros(len(g), len(g))
        for i in rows:
            kernel[i, d[i].argsort()[1 : k + 1]] = 1.0
    y, energies = probs, []
    for _ in range(100):
        y = torch.stack([(probs[i].log() + kernel[i] @ y).softmax(0) for i in rows])
        pull = (kernel @ y * y).sum() / 2
        energies.append(float((y * (y.log() - probs.log())).sum() - pull))
    return y, energies


@pytest.mark.parametrize("affinity", ["rbf", "knn", "linear"])
def test_lame_against_a_loop_over_rows(affinity):
    model, batches = tiny("groupnorm")
    answer = tt.adapt(model, tt.LAME(affinity, k=3, symmetric=False))(batches[0])
    features, probs = model[:8](batches[0]).detach(), model(batches[0]).softmax(1).detach()
    wanted, energies = lame_by_hand(features, probs, affinity, 3)
    assert torch.allclose(answer.exp(), wanted, atol=1e-4)
    if affinity != "knn":  # whose affinity is not symmetric
        assert all(b <= a + 1e-4 for a, b in itertools.pairwise(energies))


@pytest.mark.parametrize("affinity", ["rbf", "knn", "linear"])
def test_lame_on_equal_images_and_on_one(affinity):
    model, batches = tiny("groupnorm")
    x = batches[0][:1]
    equal = tt.adapt(model, tt.LAME(affinity, symmetric=False))(x.repeat(6, 1, 1, 1))
    assert equal.isfinite().all()
    assert torch.allclose(equal, equal[:1].expand_as(equal), atol=1e-5)
    alone = tt.adapt(model, tt.LAME(affinity))(x)
    assert alone.argmax() == model(x).argmax()
    assert torch.allclose(alone.exp().sum(1), torch.ones(1))


def test_lame_is_not_exported():
    model, batches = tiny("groupnorm")
    adapted = tt.adapt(model, "lame").fit(batches)
    with pytest.raises(ValueError, match="LAME corrects the predictions of a batch"):
        adapted.export(batches[0], statistics="source")


class TwoInOne(nn.Module):
    """A norm layer that is called twice, an in-place ReLU after it, one number as the answer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        for _ in range(2):
            x = self.norm(self.conv(x)).relu_()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("overwritten", [False, True])
def test_actmad_against_a_loop_over_places(overwritten):
    torch.manual_seed(0)
    model, source, x = TwoInOne().eval(), torch.rand(2, 4, 3, 6, 6), torch.rand(5, 3, 6, 6)

    def outputs(x):
        found = []
        for _ in range(2):
            x = model.norm(model.conv(x)).detach()
            found.append(x.relu() if overwritten else x)
            x = x.relu()
        return found

    loss = 0.0
    for call in range(2):
        places = outputs(x)[call].flatten(1).T
        sources = [outputs(batch)[call].flatten(1).T for batch in source]
        for f in (torch.mean, torch.var):
            wanted = [sum(float(f(s[place])) for s in sources) / 2 for place in range(len(places))]
            gaps = [abs(float(f(row)) - w) for row, w in zip(places, wanted, strict=True)]
            loss += 0.5 * sum(gaps) / len(gaps)
    adapted = tt.adapt(model, tt.ActMAD(overwritten=overwritten), source=list(source))
    with pytest.warns(UserWarning, match=r"head\.weight, head\.bias"):
        answer = adapted(x)
    assert float(adapted.notes["loss"][0]) == pytest.approx(loss, rel=1e-4)
    assert torch.equal(answer, adapted.predict(x))  # from after the update
    assert not torch.allclose(answer, model(x))
    assert torch.equal(adapted.learner.state.buffers["norm.running_mean"], model.norm.running_mean)


def test_actmad_refuses_what_it_has_no_statistics_for():
    model, batches = tiny("batchnorm2d")
    with pytest.raises(ValueError, match="ActMAD needs source data"):
        tt.adapt(model, "actmad")
    with pytest.raises(ValueError, match="one has a single image"):
        tt.adapt(model, "actmad", source=[batches[0], batches[1][:1]])
    larger = torch.rand(6, 3, 9, 9)
    with pytest.raises(ValueError, match=r"put out \[8, 9, 9\] here and \[8, 8, 8\] on source"):
        tt.adapt(model, "actmad", source=[batches[0], larger])
    adapted = tt.adapt(model, "actmad", source=batches)
    for x, said in ((larger, r"\[8, 9, 9\] here"), (batches[0][:1], "batches of at least 2")):
        before = adapted.snapshot()
        with pytest.raises(ValueError, match=said):
            adapted(x)
        assert all(
            torch.equal(before.weights[k], v) for k, v in adapted.learner.state.weights.items()
        )


def test_actmad_officials_dropout_is_on_and_its_batchnorm_in_eval_mode():
    adapted = tt.adapt(net(), tt.ActMAD.preset("official"), source=[torch.rand(8, 3, 6, 6)] * 2)
    with pytest.warns(UserWarning, match=r"6\.weight"):  # the classifier, which nothing moves
        assert modes(adapted) == {"", "0", "2", "3", "4", "6"}
