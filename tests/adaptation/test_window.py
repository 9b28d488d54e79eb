"""Single images through a window: adapt() with window=."""

import copy

import pytest
import torch

import testtime as tt
from testtime.models.tiny import tiny

W = 3


def singles(network="batchnorm2d"):
    model, batches = tiny(network)
    return model, list(torch.cat(batches).split(1))


def test_every_wth_image_adapts_to_the_last_w_and_is_answered_from_that_step():
    model, images = singles()
    windowed, batched = tt.adapt(model, tt.Tent(), window=W), tt.adapt(model, tt.Tent())
    for first in (0, W):
        answers = [windowed(image) for image in images[first : first + W]]
        expected = batched(torch.cat(images[first : first + W]))
        assert torch.equal(answers[-1], expected[-1:])
    assert windowed.report().batches == 2


def test_in_between_a_row_is_answered_beside_those_that_wait_where_rows_couple():
    model, images = singles()
    adapted, still = tt.adapt(model, tt.Tent(), window=W), tt.adapt(model, tt.Tent())
    for image in images[:W]:
        adapted(image)
    held = [*images[:W]]
    still.fit([torch.cat(held)])
    for slot in range(W - 1):
        held[slot] = images[W + slot]  # the oldest makes way
        expected = still.predict(torch.cat(held))[slot : slot + 1]
        assert torch.equal(adapted(images[W + slot]), expected)
    assert adapted.report().couples


def test_in_between_a_row_is_answered_alone_where_rows_do_not_couple():
    model, images = singles("groupnorm")
    adapted = tt.adapt(model, tt.Tent(), window=W)
    for image in images[:2]:
        torch.testing.assert_close(adapted(image), adapted.source(image))
    before = adapted.report().forwards
    adapted(images[2])
    adapted(images[3])
    assert adapted.report().forwards - before == W + 1


def test_the_window_is_state(tmp_path):
    model, images = singles()
    one, other = (tt.adapt(model, tt.Tent(), window=W) for _ in range(2))
    for image in images[: W + 1]:
        one(image)
    snapshot = one.snapshot()
    one.save(tmp_path / "state")
    rest = images[W + 1 : 2 * W + 1]
    expected = [one(image) for image in rest]
    one.restore(snapshot)
    other.load(tmp_path / "state")
    for image, answer in zip(rest, expected, strict=True):
        assert torch.equal(one(image), answer)
        assert torch.equal(other(image), answer)


def test_a_reset_empties_the_window_unless_the_method_says_otherwise():
    model, images = singles()
    plain = tt.adapt(model, tt.Tent(), window=W)
    keeps = tt.adapt(model, tt.Tent(survives=("window",)), window=W)
    for adapted in (plain, keeps):
        adapted(images[0])
        adapted.reset()
    for image in images[1:3]:
        plain(image)
        keeps(image)
    assert plain.report().batches == 0
    assert keeps.report().batches == 1
    assert torch.equal(plain(images[3]), tt.adapt(model, tt.Tent())(torch.cat(images[1:4]))[-1:])


def test_an_automatic_reset_counts_updates_and_keeps_the_rows_that_wait():
    model, images = singles()
    adapted = tt.adapt(model, tt.Tent(), window=W, reset_every=1)
    fresh = tt.adapt(model, tt.Tent())
    for first in (0, W):
        answers = [adapted(image) for image in images[first : first + W]]
        assert torch.equal(answers[-1], fresh(torch.cat(images[first : first + W]))[-1:])
        fresh.reset()


def test_the_models_own_kind_of_output_comes_back_for_one_row():
    class Dict(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            logits = self.model(x)
            return {"logits": logits, "mean": x.flatten(1).mean(1), "scale": logits.abs().max()}

    model, images = singles()
    adapted, plain = (tt.adapt(m, tt.Tent(), window=W) for m in (Dict(model), copy.deepcopy(model)))
    for image in images[: W + 2]:
        output = adapted(image)
        assert torch.equal(output["logits"], plain(image))
        assert torch.equal(output["mean"], image.flatten(1).mean(1))
        assert output["scale"].dim() == 0


def test_an_image_that_is_not_finite_stays_out_of_the_window():
    model, images = singles()
    adapted, clean = (tt.adapt(model, tt.Tent(), window=W) for _ in range(2))
    for k, image in enumerate(images[:W]):
        if k == 1:
            assert not adapted(torch.full_like(image, torch.nan)).isfinite().all()
        answers = adapted(image), clean(image)
    assert torch.equal(*answers)
    assert adapted.report().skipped == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window=1: it must be 0, for none, or a number"),
        ({"window": -2}, "window=-2"),
        ({"window": True}, "window=True"),
        ({"window": 4, "episodic": "batch"}, "episodic='batch' starts afresh at each"),
    ],
)
def test_windows_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tt.adapt(singles()[0], tt.Tent(), **options)


def test_a_batch_and_another_shape_are_refused_and_change_nothing():
    model, images = singles("groupnorm")
    adapted = tt.adapt(model, tt.Tent(), window=W)
    adapted(images[0])
    with pytest.raises(ValueError, match="window=3 takes single images, but this batch has 2 rows"):
        adapted(torch.cat(images[:2]))
    with pytest.raises(ValueError, match=r"The window holds rows \[3, .*Give all rows one shape"):
        adapted(images[1][..., :-2])
    assert adapted.snapshot().seen == 1
