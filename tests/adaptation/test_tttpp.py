"""TTT++: views told apart, features aligned."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import testtime as tt
from testtime.adaptation import views
from testtime.adaptation.alignment import Moments, contrastive, coral
from testtime.models.tiny import tiny

# Tiny batches of the source hardly differ, and what is measured by that is large.
GENTLE = {"scales": (1e-4, 1e-4)}


def headed(kind="batchnorm2d", batches=3):
    """Return a tiny network with a contrastive head beside its classifier, and batches."""
    model, images = tiny(kind, batches)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 6))
    return tt.TwoHeads(model, head, branch="8").eval(), images


@pytest.mark.parametrize("kind", ["batchnorm2d", "groupnorm"])
@pytest.mark.parametrize("law", tt.LAWS, ids=str)
def test_law(law, kind):
    law(tt.TTTpp(queue=9, **GENTLE), *headed(kind))


@pytest.mark.parametrize("number", [3, 4, 6])
@pytest.mark.parametrize(
    "method", [tt.TTTpp(align=(), head=True), tt.TTTpp(contrast=False, **GENTLE)]
)
def test_law_with_one_of_its_parts(method, number):
    (law,) = (law for law in tt.LAWS if law.number == number)
    law(method, *headed())


def recorded(adapted):
    """Return what the adapted model draws from now on, by name."""
    drawn, draw = {}, adapted.learner.draw

    def keep(name, make):
        drawn[name] = draw(name, make)
        return drawn[name]

    adapted.learner.draw = keep
    return drawn


def test_a_step_is_what_its_formulas_say():
    model, batches = headed()
    method = tt.TTTpp(optimizer=tt.SGD(lr=0.1))
    adapted = tt.adapt(model.double(), method, source=[x.double() for x in batches])
    x, drawn = batches[0].double(), recorded(adapted)
    adapted(x)
    assert drawn["views"].shape == (2, *x.shape)

    plain = [model.features(b.double()).detach() for b in batches]
    gaps = [(plain[0].T.cov() - f.T.cov()).square().sum() / (4 * 64) for f in plain[1:]]
    assert torch.allclose(adapted.learner.constants["coral_features"], torch.stack(gaps).mean())
    rest = torch.cat(plain[1:])
    assert torch.allclose(adapted.learner.constants["cov_features"], rest.T.cov())
    assert torch.allclose(adapted.learner.constants["mean_features"], rest.mean(0))

    model.net.train()
    f = F.normalize(model.task(drawn["views"].flatten(0, 1)), dim=1)
    s, rows = f @ f.T / 0.5, len(f)
    contrast = 0.0
    for i in range(rows):
        j = (i + rows // 2) % rows
        others = torch.cat([s[i, :i], s[i, i + 1 :]])
        contrast = contrast - (s[i, j] - others.exp().sum().log()) / rows
    (noted,) = adapted.notes["contrast"]
    assert torch.allclose(noted, 0.5 / 0.07 * contrast)
    f = model.features(x)
    known = adapted.learner.constants
    expected = 0.05 * (known["cov_features"] - f.T.cov()).square().sum() / (4 * 64)
    expected = expected / known["coral_features"]
    apart = (known["mean_features"] - f.mean(0)).square().mean()
    expected = expected + 0.025 * apart / known["mmd_features"]
    assert torch.allclose(adapted.notes["align_features"][0], expected)
    total = sum(adapted.notes[k][0] for k in ("contrast", "align_features", "align_head"))
    assert torch.allclose(adapted.notes["loss"][0], total)


def test_the_shared_part_alone_adapts_unless_the_head_does_too():
    model, batches = headed()
    for head in (False, True):
        adapted = tt.adapt(model, tt.TTTpp(head=head), source=batches)
        adapted(batches[0])
        names = set(adapted.report().adapts)
        assert names == {*model.shared(), *(f"head.{k}" for k in model.head.state_dict() if head)}
        state, start = adapted.learner.state, adapted.learner.start
        assert any(not torch.equal(state.weights[k], start.weights[k]) for k in names)
        assert torch.equal(start.weights["net.0.weight"], model.net[0].weight)


@pytest.mark.parametrize("method", [tt.TTTpp(), tt.TTTpp(align=()), tt.TTTpp(contrast=False)])
def test_it_costs_what_it_says(method):
    model, batches = headed()
    adapted = tt.adapt(model, method, source=batches)
    adapted(batches[0])
    before, rows = adapted.report(), len(batches[1])
    adapted(batches[1])
    after = adapted.report()
    spent = (after.forwards - before.forwards, after.backwards - before.backwards)
    assert spent == tuple(rows * times for times in method.cost)


def test_warmup_moves_statistics_alone_and_alignment_may_come_later():
    model, batches = headed()
    adapted = tt.adapt(model, tt.TTTpp(warmup=1, align_after=2), source=batches)
    start = adapted.snapshot()
    adapted(batches[0])
    state = adapted.snapshot()
    assert all(torch.equal(start.weights[k], w) for k, w in state.weights.items())
    assert not torch.equal(start.buffers["net.1.running_mean"], state.buffers["net.1.running_mean"])
    adapted(batches[1])
    assert "align_head" not in adapted.notes
    adapted(batches[2])
    assert "align_head" in adapted.notes
    state = adapted.snapshot()
    assert any(not torch.equal(start.weights[k], w) for k, w in state.weights.items())


def test_the_queue_holds_the_last_rows_whatever_the_batches():
    model, images = headed("groupnorm", batches=4)
    method = tt.TTTpp(queue=8, contrast=False, optimizer=tt.SGD(lr=1e-9))
    adapted = tt.adapt(model, method, source=images)
    rows = torch.cat([model.features(x) for x in images]).detach()
    seen = 0
    for size in (6, 2, 5, 3):
        x = torch.cat(images)[seen : seen + size]
        adapted(x)
        seen += size
        held = adapted.learner.state.memory["queue_features"]
        expected = {tuple(r.tolist()) for r in rows[max(seen - 8, 0) : seen].round(decimals=4)}
        kept = {tuple(r.tolist()) for r in held.round(decimals=4) if r.any()}
        assert kept == expected
    assert int(adapted.learner.state.memory["next"]) == seen % 8


def test_views_are_images_each_cut_for_itself():
    x = torch.rand(64, 3, 12, 12)
    view = views.contrastive(x, torch.Generator().manual_seed(0))
    assert view.shape == x.shape
    assert view.dtype == x.dtype
    assert float(view.min()) >= 0
    assert float(view.max()) <= 1
    gray = (view[:, 0] == view[:, 1]).flatten(1).all(1)
    assert 4 <= int(gray.sum()) <= 24  # a fifth of 64
    same = views.contrastive(x, torch.Generator().manual_seed(0))
    assert torch.equal(same, view)
    plain = torch.full((40, 3, 8, 8), 0.5)
    levels = views.contrastive(plain, torch.Generator().manual_seed(1)).flatten(1)
    assert levels.std(0).min() > 0


def test_moments_of_parts_are_those_of_the_whole_and_distances_are_zero_at_home():
    f, g = torch.randn(7, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    moments = Moments.of(f).plus(Moments.of(g))
    both = torch.cat([f, g])
    assert torch.allclose(moments.covariance, both.T.cov())
    assert torch.allclose(moments.mean, both.mean(0))
    assert torch.equal(Moments.of(f).plus(Moments.of(g), 0.0).covariance, Moments.of(f).covariance)
    assert float(coral(moments.covariance, moments.covariance)) == 0
    unit = F.normalize(torch.eye(4, 5).repeat(2, 1), dim=1)
    assert float(contrastive(unit, 0.01)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m, x: tt.adapt(m.net, tt.TTTpp(), source=x), "tells views of images apart"),
        (lambda m, x: tt.adapt(m, tt.TTTpp()), "TTTpp needs source data"),
        (lambda m, x: tt.adapt(m, tt.TTTpp(), source=x[:2]), "at least three batches"),
        (lambda m, x: tt.adapt(m, tt.TTTpp(), source=x[:1] * 3), "are all alike"),
        (lambda m, x: tt.adapt(m, tt.TTTpp(), source=x)(x[0][:1]), "batches of at least 2"),
        (lambda m, x: tt.adapt(m, tt.TTTpp(), source=x)(4 * x[0]), r"images in \[0, 1\]"),
        (lambda m, x: tt.TTTpp(align=("logits",)), r"names \['logits'\]"),
        (lambda m, x: tt.TTTpp(contrast=False, align=()), "nothing to learn from"),
        (lambda m, x: tt.TTTpp(queue=-1), "counts, of at least 0"),
    ],
)
def test_what_cannot_work_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make(*headed())


def test_without_alignment_it_needs_no_source():
    model, batches = headed()
    assert not tt.TTTpp(align=()).needs_source
    adapted = tt.adapt(model, tt.TTTpp(align=()))
    before = adapted.predict(batches[0])
    adapted.fit(batches, passes=2)
    assert not torch.equal(adapted.predict(batches[0]), before)
    assert adapted.answers == "after"
