"""What the methods that descend an entropy do beyond their recordings."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import testtime as tt
from testtime.adaptation import views
from testtime.adaptation.methods import METHODS
from testtime.adaptation.objectives import entropy
from testtime.models.tiny import tiny

KEEPS_ALL = {"margin": 1.0, "redundancy": 1.0}


class Segmenter(nn.Module):
    """Logits [B, 4, H, W]: a prediction for every pixel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 4, 1)
        )

    def forward(self, x):
        return 5 * self.layers(x)


def moved(adapted):
    state, start = adapted.learner.state, adapted.learner.start
    return [k for k in state.weights if not torch.equal(state.weights[k], start.weights[k])]


def halfway(entropies):
    """Return a margin that half of the entropies of 5 classes are below."""
    low, high = entropies.sort().values[len(entropies) // 2 - 1 :][:2]
    return float(low + high) / 2 / math.log(5)


def test_eta_on_dense_logits_is_a_loop_over_pixels():
    model, method = Segmenter().double().eval(), tt.ETA(margin=0.8, redundancy=0.9)
    adapted = tt.adapt(model, method)
    average = None
    for seed in range(3):
        x = torch.rand(2, 3, 5, 5, dtype=torch.float64, generator=torch.manual_seed(seed))
        logits = adapted(x)
        loss, kept, reliable = 0.0, [], 0
        for pixel in logits.permute(0, 2, 3, 1).reshape(-1, 4):
            p = pixel.softmax(0)
            h = -(p * p.log()).sum()
            if h >= 0.8 * math.log(4):
                continue
            reliable += 1
            if average is None or F.cosine_similarity(average, p, dim=0).abs() < 0.9:
                kept.append(p)
                loss = loss + (0.8 * math.log(4) - h).exp() * h
        assert 0 < len(kept) < 50
        assert torch.allclose(adapted.notes["loss"][0], loss / len(kept), rtol=1e-12)
        now = torch.stack(kept).mean(0)
        average = now if average is None else 0.9 * average + 0.1 * now
        assert torch.allclose(adapted.learner.state.memory["average"], average, rtol=1e-12)
        assert int(adapted.notes["reliable"][0].sum()) == reliable


def test_redundancy_goes_through_the_papers_values():
    assert tt.ETA()._redundancy(10) == pytest.approx(0.4)
    assert tt.ETA()._redundancy(1000) == pytest.approx(0.05)
    for classes in (2, 5, 100, 345, 21_000):
        assert 1 / math.sqrt(classes) < tt.ETA()._redundancy(classes) < 1


def test_a_redundancy_for_another_number_of_classes_is_told():
    model, batches = tiny("groupnorm")
    adapted = tt.adapt(model, tt.ETA(redundancy=0.05))
    with pytest.warns(UserWarning, match=r"ETA\(redundancy=0.05\) does not fit 5 classes"):
        adapted(batches[0])
    tt.adapt(model, tt.ETA.preset("cifar10", redundancy=0.45))(batches[0])


def test_eta_forgets_its_average_with_a_reset_but_not_under_official():
    model, batches = tiny("groupnorm")
    for preset, survives in ((), False), (("official", "sar"), True):
        adapted = tt.adapt(model, tt.ETA.preset(*preset, **KEEPS_ALL))
        adapted(batches[0])
        assert moved(adapted)
        before = adapted.snapshot().memory
        adapted.reset()
        assert not moved(adapted)
        after = adapted.learner.state.memory
        assert torch.equal(after["average"], before["average"]) == survives
        assert int(after["selected"]) == (len(batches[0]) if survives else 0)


def test_eata_needs_source_data():
    model = tiny("groupnorm")[0]
    with pytest.raises(ValueError, match="EATA needs source data, but none was given"):
        tt.adapt(model, "eata")
    with pytest.raises(ValueError, match="held no batch"):
        tt.adapt(model, "eata", source=[])


def test_eata_holds_the_weights_that_matter_to_the_source():
    model, batches = tiny("batchnorm2d")
    (weak, strong) = (
        tt.adapt(model, tt.EATA(strength=s, optimizer=tt.SGD(lr=0.05), **KEEPS_ALL), source=batches)
        for s in (0.0, 300.0)
    )
    for adapted in (weak, strong):
        for x in batches * 5:
            adapted(x)

    def distance(adapted):
        fisher, state = adapted.learner.constants, adapted.learner.state
        return sum(
            float((fisher[k] * (w - adapted.learner.start.weights[k]) ** 2).sum())
            for k, w in state.weights.items()
        )

    assert 0 < distance(strong) < 0.5 * distance(weak)


def test_rdumb_is_eta_that_resets_by_itself():
    model, batches = tiny("groupnorm")
    rdumb = tt.adapt(model, tt.RDumb(reset_every=2, **KEEPS_ALL))
    eta = tt.adapt(model, tt.ETA(**KEEPS_ALL))
    first = [eta(x) for x in batches[:2]]
    eta.reset()
    for x, answer in zip(batches, [*first, eta(batches[2])], strict=True):
        assert torch.equal(rdumb(x), answer)
    assert tt.RDumb().reset_every == 1000
    assert int(rdumb.learner.state.memory["selected"]) == len(batches[2])


def test_deyos_weight_and_filters():
    model, batches = tiny("groupnorm")
    x = batches[0]
    h = entropy(model(x)).detach()
    margin = halfway(h)
    for change, weigh in (
        ({}, lambda h, d: (0.4 * math.log(5) - h).exp() + d.exp()),
        ({"weights": ("entropy",)}, lambda h, d: (0.4 * math.log(5) - h).exp()),
        ({"weights": ("plpd",)}, lambda h, d: d.exp()),
        ({"weights": ()}, lambda h, d: torch.ones_like(h)),
    ):
        adapted = tt.adapt(model, tt.DeYO(margin=margin, plpd=-0.1, **change))
        adapted(x)
        (plpd,), (kept,) = adapted.notes["plpd"], adapted.notes["kept"]
        assert torch.equal(kept, (h < margin * math.log(5)) & (plpd > -0.1))
        assert 0 < kept.sum() < len(x)
        expected = (weigh(h, plpd) * h)[kept].mean()
        assert torch.allclose(adapted.notes["loss"][0], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["batchnorm2d", "groupnorm"])
@pytest.mark.parametrize("never", [{"margin": 1e-6}, {"margin": None, "plpd": 0.99}])
def test_deyo_leaves_all_as_it_is_where_nothing_passes(kind, never):
    model, batches = tiny(kind)
    adapted = tt.adapt(model, tt.DeYO(**never))
    start = adapted.snapshot()
    for x in batches:
        adapted(x)
    state = adapted.snapshot()
    assert state.batch == len(batches)
    for path, tensor in start.tensors().items():
        if path != "generator":
            assert torch.equal(tensor, state.tensors()[path]), path


def test_deyo_forwards_the_sure_alone_where_rows_couple():
    model, batches = tiny("batchnorm2d")
    x = batches[0]
    h = entropy(tt.adapt(model, tt.Tent())(x))
    adapted = tt.adapt(model, tt.DeYO(margin=halfway(h), plpd=None, destroy="occ"))
    adapted(x)
    (sure,) = adapted.notes["sure"]
    assert 1 < sure.sum() < len(x)
    destroyed = x.clone()
    destroyed[..., 2:6, 2:6] = x.mean((2, 3), keepdim=True)
    alone = tt.adapt(model, tt.Tent())(destroyed[sure])
    assert torch.allclose(adapted.notes["destroyed_logits"][0][sure], alone, atol=1e-6)


def test_patches_are_shuffled_within_each_image_and_sides_may_differ():
    x = torch.arange(2 * 8 * 12).float().view(2, 1, 8, 12)
    order = torch.stack([torch.arange(16), torch.arange(16).flip(0)])
    shuffled = views.shuffled_patches(x, order, 4)
    assert torch.equal(shuffled[0], x[0])
    assert torch.equal(shuffled[1, 0, :2, :3], x[1, 0, 6:, 9:])
    assert torch.equal(shuffled[1].unique(), x[1].unique())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tt.DeYO(destroy="blur"), "destroy='blur'"),
        (lambda: tt.DeYO(weights=("entropy", "margin")), r"names \['margin'\]"),
        (lambda: tt.DeYO(patches=1), "patches=1"),
        (
            lambda: tt.adapt(tiny("batchnorm1d")[0], "deyo")(torch.rand(4, 10)),
            "destroys the shapes",
        ),
        (lambda: tt.adapt(tiny("groupnorm")[0], "deyo")(torch.rand(4, 3, 3, 8)), "cannot cut"),
        (lambda: tt.adapt(Segmenter(), "deyo")(torch.rand(4, 3, 8, 8)), "one prediction an image"),
    ],
)
def test_deyo_refuses(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("kind", ["batchnorm2d", "groupnorm"])
@pytest.mark.parametrize(
    "method", [tt.ETA(**KEEPS_ALL), tt.EATA(**KEEPS_ALL), tt.DeYO(margin=None)]
)
def test_they_cost_what_they_say(method, kind):
    model, batches = tiny(kind)
    adapted = tt.adapt(model, method, source=batches)
    adapted(batches[0])
    before, rows = adapted.report(), len(batches[1])
    adapted(batches[1])
    after = adapted.report()
    spent = (after.forwards - before.forwards, after.backwards - before.backwards)
    assert spent == tuple(rows * times for times in method.cost)


@pytest.mark.parametrize("method", ["tent", "sar", "eta", "eata", "rdumb"])
def test_come_is_an_option_of_the_entropy_methods(method):
    model, batches = tiny("groupnorm")
    plain = METHODS[method].preset("come")
    assert plain.entropy == tt.OpinionEntropy()
    adapted = tt.adapt(model, plain, source=batches)
    logits = adapted(batches[0])
    assert torch.equal(adapted.notes["entropy"][0], tt.OpinionEntropy(5)(logits))
    assert not torch.allclose(adapted.notes["entropy"][0], tt.OpinionEntropy(1000)(logits))


def test_the_entropy_of_opinions_sends_no_gradient_along_the_logits():
    z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    values = tt.OpinionEntropy(6)(z)
    (grad,) = torch.autograd.grad(values.sum(), z)
    assert torch.allclose((grad * z).sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12)
    e, m = z.detach().exp(), 6.0
    q = torch.cat([e, torch.full((4, 1), m)], 1) / (e.sum(1, keepdim=True) + m) + 1e-7
    assert torch.allclose(values, -(q * q.log()).sum(1))


def test_entropy_takes_dense_logits_as_a_loop_over_pixels():
    z = torch.randn(2, 4, 3, 3)
    for objective in (entropy, tt.OpinionEntropy(), tt.OpinionEntropy(10)):
        whole = objective(z)
        assert whole.shape == (2, 3, 3)
        for row in range(3):
            for column in range(3):
                assert torch.allclose(whole[:, row, column], objective(z[:, :, row, column]))
