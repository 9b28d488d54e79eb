"""MEMO beyond its recordings."""

from pathlib import Path

import pytest
import torch
from torch import nn

import testtime as tt
from tests.parity.recording import read
from tests.parity.systems.memo import mixtures
from testtime.adaptation import views
from testtime.adaptation.objectives import marginal_entropy
from testtime.adaptation.views import augmix, pillow
from testtime.models.tiny import tiny

GOLDENS = Path(__file__).parents[2] / "goldens" / "memo"
FEW = tt.MEMO(views=2, optimizer=tt.SGD(0.1))
RED = (128 / 255, 0.0, 0.0)


def picture(name="augmix_views"):
    recording = read(GOLDENS / f"{name}.safetensors")
    return recording["in/image"].permute(2, 0, 1).unsqueeze(0).double() / 255, recording


def test_each_image_is_an_episode_unless_told_otherwise():
    model, batches = tiny("groupnorm")
    adapted = tt.adapt(model, FEW, many="loop")
    answers = adapted(batches[0])
    alone = torch.cat([adapted(row) for row in batches[0].split(1)])
    torch.testing.assert_close(answers, alone)
    assert not torch.allclose(answers, adapted.source(batches[0]), rtol=1e-3)
    torch.testing.assert_close(adapted.predict(batches[0]), adapted.source(batches[0]))
    online = tt.adapt(model, FEW, episodic=False)
    online(batches[0])
    assert not torch.allclose(online.predict(batches[1]), online.source(batches[1]), rtol=1e-3)


@pytest.mark.parametrize("kind", ["groupnorm", "batchnorm2d"])
def test_many_at_once_are_as_one_at_a_time(kind):
    model, batches = tiny(kind)
    model, x = model.double(), batches[0].double()
    once, loop = (tt.adapt(model, FEW, many=many) for many in ("vmap", "loop"))
    torch.testing.assert_close(once(x), loop(x), rtol=1e-10, atol=1e-12)
    assert not any("refused" in sentence for sentence in once.report().said)


def test_official_carries_the_moments_on_to_the_next_image():
    model, batches = tiny("groupnorm")
    method = tt.MEMO.preset("official", "imagenet", "adamw", views=2, crop="padded")
    together, apart = tt.adapt(model, method), tt.adapt(model, method, episodic="batch")
    answers = together(batches[0])
    expected = torch.cat([apart(row) for row in batches[0].split(1)])
    assert torch.equal(answers, expected)
    assert int(together.snapshot().slots["step"]["all"]) == len(batches[0])
    fresh = tt.adapt(model, tt.MEMO.preset("imagenet", "adamw", views=2), many="loop")
    fresh(batches[0])
    assert int(fresh.snapshot().slots["step"]["all"]) == 0


def test_the_prior_mixes_statistics_of_the_views_and_takes_no_gradient_through_them():
    model, batches = tiny("batchnorm2d")
    layer, x = model[1], batches[0]
    net = tt.adapt(model, tt.MEMO(prior=3, views=2), episodic="batch")
    h = model[0](x)
    mean = 0.75 * layer.running_mean + 0.25 * h.mean((0, 2, 3))
    var = 0.75 * layer.running_var + 0.25 * h.var((0, 2, 3))
    seen = []
    net.learner.module[1].register_forward_hook(lambda m, args, out: seen.append(out))
    net.predict(x)
    normal = (h - mean.view(-1, 1, 1)) / (var + layer.eps).sqrt().view(-1, 1, 1)
    expected = normal * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(seen[-1], expected)


def test_marginal_entropy_of_one_view_is_its_entropy():
    logits = torch.randn(1, 4, 5)
    probs = logits[0].softmax(-1)
    torch.testing.assert_close(marginal_entropy(logits), -(probs * probs.log()).sum(-1))
    sure = torch.tensor([[[1e4, 0.0]], [[1e4, 0.0]]])
    assert marginal_entropy(sure).tolist() == [0.0]
    assert marginal_entropy(-sure).tolist() == [0.0]


@pytest.mark.parametrize(("name", "mean"), [("augmix_views", 0.4), ("augmix_moves", 0.4)])
def test_torch_is_within_levels_of_pillow(name, mean):
    x, recording = picture(name)
    drawn = mixtures(recording.config)
    (plain, ends), (exact, theirs) = augmix.chains(x, drawn, RED), pillow.chains(x, drawn)
    assert (plain - exact).abs().max() < 1e-12
    off = 255 * (ends - theirs).abs()
    # Pillow cuts to whole levels after every operation, torch does not: up to a level for each.
    cuts = (augmix.OPERATIONS.index("solarize"), augmix.OPERATIONS.index("posterize"))
    smooth = ~torch.isin(drawn.operations, torch.tensor(cuts)).any(-1)
    assert off[smooth].max() < 2
    # A threshold turns less than a level into many, at few pixels.
    assert (off[~smooth] >= 2).double().mean() < 0.005
    mixtures_off = 255 * (views.mixed(plain, ends, drawn) - views.mixed(exact, theirs, drawn)).abs()
    assert mixtures_off.mean() < mean


@pytest.mark.parametrize(("crop", "mean"), [("padded", 0.5), ("resized", 2.0)])
def test_its_own_draws_too(crop, mean):
    x, _ = picture()
    drawn = views.draw_mixtures(x, 64, crop, torch.Generator().manual_seed(0))
    assert drawn.weights.sum(1).tolist() == pytest.approx([1] * 64)
    counts = (drawn.operations >= 0).sum(-1)
    assert {*counts.flatten().tolist()} == {1, 2, 3}
    assert {*drawn.operations.flatten().tolist()} == {-1, *range(len(augmix.OPERATIONS))}
    off = [
        views.mixed(*one, drawn) - views.mixed(*other, drawn)
        for one, other in [(augmix.chains(x, drawn, RED), pillow.chains(x, drawn))]
    ]
    assert 255 * off[0].abs().mean() < mean


def test_equalized_as_pillow_does_where_there_is_one_level_alone():
    x = torch.full((1, 3, 8, 8), 100 / 255, dtype=torch.float64)
    torch.testing.assert_close(augmix._equalize(255 * x), x)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tt.MEMO(crop="none"), r"MEMO\(crop='none'\) is not known"),
        (lambda: tt.MEMO(augment="numpy"), r"MEMO\(augment='numpy'\)"),
        (lambda: tt.MEMO(views=0), "views are at least 1"),
        (lambda: tt.MEMO(prior=-1), "the prior at least 0"),
    ],
)
def test_bad_hyper_parameters(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.randn(2, 3, 8, 8), r"MEMO augments images in \[0, 1\]"),
        (torch.rand(2, 3, 4, 4, 4), "MEMO augments colour images"),
        (torch.rand(2, 3, 8, 8), "the logits are dense"),
    ],
)
def test_what_it_cannot_work_on(x, said):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
    with pytest.raises(ValueError, match=said):
        tt.adapt(model.eval(), FEW, many="loop")(x)


def test_a_window_is_refused():
    with pytest.raises(ValueError, match="starts afresh"):
        tt.adapt(tiny("groupnorm")[0], FEW, window=4)
