"""TTT-MAE beyond its recordings: the laws, what stays, masks, options, and bad input."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

import testtime as tt
from tests.adaptation.test_adapted import LOOKS, Recorder
from testtime.adaptation.methods.ttt_mae import _crops
from testtime.models import Normalize
from testtime.models.mae import MAE, MAEClassifier, Sizes

FEW = {"copies": 3, "steps": 2, "optimizer": tt.SGD(lr=0.05, momentum=0.9)}
OPTIONS = {
    "plain": {},
    "stopping": {"held_out": 0.3, "steps": 3, "trains": "low-rank"},
    "parts": {"accumulate": 2, "trains": "all", "restarts": True, "crops": True, "watch": True},
}


def network(**changes):
    torch.manual_seed(0)
    args = {"head": Sizes(8, 1, 2), "classes": 5, "normalised": True} | changes
    return MAE(12, 4, Sizes(16, 1, 2), Sizes(8, 1, 2), **args).eval()


def images(count=3, seed=0):
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("law", tt.LAWS, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_law(law, option):
    batches = [images(rows, seed) for seed, rows in enumerate((3, 3, 2))]
    law(tt.TTTMAE(**FEW | OPTIONS[option]), network(), batches)


def test_the_official_preset_breaks_the_law_of_episodes():
    with pytest.raises(tt.LawBroken, match="Law 6, episodes are independent"):
        tt.LAWS[5](tt.TTTMAE.preset("official", **FEW), network(), [images(3), images(3, 1)])


@pytest.mark.parametrize("trains", ["encoder", "all", "norms", "low-rank"])
def test_what_trains_and_what_never_does(trains):
    mae, x = network(), images()
    adapted = tt.adapt(mae, tt.TTTMAE(**FEW, trains=trains))
    adapted(x)
    moved = {k for k, w in adapted.learner.state.weights.items() if bool((w != 0).any())}
    if trains != "low-rank":
        start = dict(mae.named_parameters())
        state = adapted.learner.state.weights
        moved = {k for k, w in state.items() if not torch.equal(w, start[k])}
    assert moved == set(adapted.learner.selected)
    parts = {name.split(".")[0] for name in moved}
    encoder = {"patch_embed", "blocks", "norm", "cls_token", "mask_token"}
    decoder = {f"decoder_{part}" for part in ("embed", "blocks", "norm", "pred")}
    assert (
        parts
        == {
            "encoder": encoder,
            "all": encoder | decoder,
            "norms": {"blocks", "norm"},
            "low-rank": {"blocks"},
        }[trains]
    )


def test_tokens_stay_if_they_are_told_to():
    chosen = tt.adapt(network(), tt.TTTMAE(**FEW, tokens=False)).learner.selected
    assert not any("token" in name for name in chosen)
    assert "patch_embed.proj.weight" in chosen


def test_every_image_begins_at_the_stored_weights_with_the_same_masks():
    x = images()
    together = tt.adapt(network(), tt.TTTMAE(**FEW), episodic="sample", many="loop")
    answers = together(x)
    losses = torch.stack(together.notes["loss"], 1)
    for row in range(3):
        alone = tt.adapt(network(), tt.TTTMAE(**FEW), episodic="batch")
        torch.testing.assert_close(alone(x[row : row + 1]), answers[row : row + 1])
        torch.testing.assert_close(torch.stack(alone.notes["loss"]), losses[row])


def test_the_official_preset_keeps_one_stream_of_masks():
    x = images(1)
    for preset, alike in ((), True), (("official",), False), (("paper",), False):
        adapted = tt.adapt(network(), tt.TTTMAE.preset(*preset, **FEW), episodic="batch")
        first, second = adapted(x), adapted(x)
        assert torch.equal(first, second) == alike
    assert tt.TTTMAE.preset("paper").optimizer == tt.SGD(5e-3, 0.9, weight_decay=0.2)
    official = tt.TTTMAE.preset("official")
    assert (official.steps, official.copies, official.mask_ratio) == (20, 128, 0.75)
    assert official.optimizer == tt.SGD(5e-3, 0.9)


@pytest.mark.parametrize("option", ["plain", "parts"])
def test_many_at_once_are_as_many_one_after_another(option):
    method = tt.TTTMAE(**FEW | OPTIONS[option])
    mae, x = network().double(), images().double()
    one, many = (tt.adapt(mae, method, episodic="sample", many=m) for m in ("loop", "vmap"))
    torch.testing.assert_close(many(x), one(x), rtol=1e-9, atol=1e-11)
    assert not any("vmap refused" in said for said in many.report().said)


def test_restarts_make_the_optimiser_new_and_keep_the_weights():
    x, y = images(1, 0), images(1, 1)
    for restarts in (False, True):
        adapted = tt.adapt(network(), tt.TTTMAE(**FEW, restarts=restarts))
        adapted(x)
        weights = {k: w.clone() for k, w in adapted.learner.state.weights.items()}
        generator = adapted.learner.generator.get_state()
        adapted(y)
        fresh = network()
        fresh.load_state_dict(weights, strict=False)
        other = tt.adapt(fresh, tt.TTTMAE(**FEW))
        other.learner.start.generator = generator
        other.learner.state.generator = generator
        other.learner.generator.set_state(generator)
        other(y)
        pairs = [
            (adapted.learner.state.weights[k], w) for k, w in other.learner.state.weights.items()
        ]
        assert all(torch.equal(a, b) for a, b in pairs) == restarts


def test_parts_of_a_step_have_the_mean_gradient_of_all_masks():
    x, method = images(1).double(), tt.TTTMAE(**FEW | {"steps": 1})
    noise = torch.rand(6, 9, dtype=torch.float64)
    values = {"noise": noise, "noise.0": noise[:3], "noise.1": noise[3:]}
    states = []
    for options in ({"copies": 6}, {"copies": 3, "accumulate": 2}):
        adapted = tt.adapt(network().double(), tt.TTTMAE(**vars(method) | options))
        adapted.learner.draw = lambda name, make: values[name]
        adapted(x)
        states.append(adapted.learner.state.weights)
    torch.testing.assert_close(*states, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(adapted.notes["losses"][0].mean(), adapted.notes["loss"][0])


def test_it_stops_where_held_out_patches_get_worse():
    # A rate at which the second step already does harm.
    method = tt.TTTMAE(copies=8, steps=6, held_out=0.3, optimizer=tt.SGD(lr=3.0))
    adapted = tt.adapt(network(), method, episodic="batch")
    adapted(images(1))
    held = torch.stack(adapted.notes["held_loss"])
    taken = int(held.isfinite().sum()) - 1
    assert len(held) == 6
    assert 1 <= taken < 5
    falls = held[: taken + 1].diff() < 0
    assert falls[:-1].all()
    assert not falls[-1]
    short = tt.adapt(network(), tt.TTTMAE(**vars(method) | {"steps": taken}), episodic="batch")
    assert torch.equal(short(images(1)), adapted(images(1)))


def test_held_out_patches_are_never_seen_and_not_trained_on():
    adapted = tt.adapt(network(), tt.TTTMAE(**FEW, held_out=0.4))
    mae, seen = adapted.learner.module, []
    reconstruct = mae.reconstruct

    def watching(*args):
        seen.append(reconstruct(*args))
        return seen[-1]

    mae.reconstruct = watching
    adapted(images())
    held = adapted.learner.state.memory["held_out"]
    assert int(held.sum()) == 3  # of 7 hidden of 9
    assert bool(torch.stack([made.masking.mask[:, held].all() for made in seen]).all())
    errors = (seen[0].prediction - seen[0].target).square().mean(-1)
    trained = seen[0].masking.mask & ~held
    torch.testing.assert_close(adapted.notes["loss"][0], errors[trained].mean())


def test_the_answers_on_the_way_are_there_when_asked_for():
    x = images()
    adapted = tt.adapt(network(), tt.TTTMAE(**FEW, watch=True))
    answer = adapted(x)
    first, second = adapted.notes["logits"]
    torch.testing.assert_close(first, network()(x))
    assert not torch.equal(first, second)
    assert not torch.equal(second, answer)
    assert "logits" not in tt.adapt(network(), tt.TTTMAE(**FEW)).notes


def test_low_rank_begins_as_the_source_and_is_found_again_by_the_seed():
    x, method = images(), tt.TTTMAE(**FEW, trains="low-rank", rank=2)
    adapted = tt.adapt(network(), method)
    torch.testing.assert_close(adapted.predict(x), network()(x))
    assert adapted.learner.state.weights["blocks.0.attn.qkv.down"].shape == (2, 16)
    assert torch.equal(tt.adapt(network(), method)(x), adapted(x))
    assert {name.split(".")[-1] for name in adapted.learner.selected} == {"down", "up"}


def test_crops_are_crops():
    ramp = torch.arange(12.0).expand(1, 1, 12, 12) + 100 * torch.arange(12.0).view(1, 1, 12, 1)
    views = _crops(ramp, 200, torch.Generator().manual_seed(0))
    assert views.shape == (200, 1, 12, 12)
    inside = views[:, 0, 2:-2, 2:-2]
    across = inside[:, :, -1] - inside[:, :, 0]
    shares = across[:, 0].abs() / 7 * ((inside[:, -1, 0] - inside[:, 0, 0]) / 700)
    # Sizes of the crops as shares of the image, from the slopes of a ramp.
    assert 0.15 < shares.min() < 0.35
    assert 0.8 < shares.max() < 1.1
    flipped = (across[:, 0] < 0).double().mean()
    assert abs(flipped - 0.5) < 4 * 0.5 / math.sqrt(200)


def test_behind_a_normalisation():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.2)
    parts = OrderedDict(normalize=Normalize(mean, std), model=network())
    x = images()
    inside = tt.adapt(nn.Sequential(parts), tt.TTTMAE(**FEW))
    alone = tt.adapt(network(), tt.TTTMAE(**FEW))
    assert inside.learner.selected == [f"model.{name}" for name in alone.learner.selected]
    torch.testing.assert_close(inside(x), alone(Normalize(mean, std)(x)))


def test_losses_fall_and_cost_what_they_say():
    method = tt.TTTMAE(copies=8, steps=15, optimizer=tt.SGD(lr=0.1, momentum=0.9))
    adapted = tt.adapt(network(), method)
    adapted(images(1))
    losses = torch.stack(adapted.notes["loss"])
    assert losses[-3:].mean() < losses[:3].mean()
    assert method.cost == (8, 8)
    assert adapted.report().backwards == 15 * 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"copies": 0}, r"\{'copies': 0\} must be at least 1"),
        ({"accumulate": 0}, "must be at least 1"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0"),
        ({"mask_ratio": math.nan}, "mask_ratio=nan"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"trains": "head"}, "trains='head'"),
        ({"held_out": 0.2, "accumulate": 2}, "choose one of them"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        tt.TTTMAE(**options)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(432, 5)), {}, "found Linear"),
        (MAEClassifier(12, 4, Sizes(16, 1, 2)), {}, "found MAEClassifier"),
        (network(), {"mask_ratio": 0.95}, "hides all of 9 patches"),
        (network(normalised=None), {}, "plain pixels or pixels normalised"),
        (network(), {"normalised": False}, "trained with normalised=True"),
        (network(task="rotation"), {}, "a decoder for rotation"),
    ],
)
def test_models_that_do_not_fit(model, options, said):
    with pytest.raises(ValueError, match=said):
        tt.adapt(model, tt.TTTMAE(**FEW | options))


def test_an_unknown_target_may_be_given():
    adapted = tt.adapt(network(normalised=None), tt.TTTMAE(**FEW, normalised=True))
    other = tt.adapt(network(), tt.TTTMAE(**FEW))
    assert torch.equal(adapted(images()), other(images()))


def test_images_of_another_size_and_nan_are_refused():
    adapted = tt.adapt(network(), tt.TTTMAE(**FEW))
    before = adapted.snapshot().tensors()
    with pytest.raises(ValueError, match=r"takes images \[N, 3, 12, 12\]"):
        adapted(torch.rand(2, 3, 16, 16))
    bad = images()
    bad[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        adapted(bad)
    after = adapted.snapshot().tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("options", [{}, {"crops": True, "accumulate": 2}])
def test_steps_are_alike_and_do_not_look(options):
    adapted = tt.adapt(network(), tt.TTTMAE(**FEW | options))
    adapted(images(3, 0))
    runs = []
    for seed in (1, 2):
        with Recorder() as recorder:
            adapted(images(3, seed))
        runs.append(recorder.seen)
    assert runs[0] == runs[1]
    looks = [name for name, *_ in runs[0] if any(look in name for look in LOOKS)]
    # The one look of every method that draws: was the batch finite, or do its numbers go back?
    assert len(looks) <= 1
