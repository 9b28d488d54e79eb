"""CoTTA beyond its recordings."""

import pytest
import torch
from torch import nn

import testtime as tt
from testtime.adaptation import views
from testtime.models.tiny import ROWS, tiny

ALWAYS = tt.CoTTA(threshold=1.1, views=5)


@pytest.mark.parametrize(("kind", "calls"), [("groupnorm", 1), ("batchnorm2d", 5)])
def test_views_are_answered_together_where_rows_do_not_couple(kind, calls, monkeypatch):
    model, batches = tiny(kind)
    sizes = []
    together, alone = (tt.adapt(model.double(), ALWAYS) for _ in range(2))
    x = batches[0].double()
    together.learner.module.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    answer = together(x)
    assert sizes.count(ROWS * 5 // calls) >= calls
    many, one = views.many, []

    def recorded(*args):
        one.append(many(*args))
        return one[-1]

    monkeypatch.setattr(views, "many", recorded)
    monkeypatch.setattr(views, "at_once", lambda x: 1)
    torch.testing.assert_close(alone(x), answer, rtol=1e-10, atol=1e-12)
    expected = torch.stack([alone.source(view) for view in one[0]]).mean(0)
    if kind == "groupnorm":
        torch.testing.assert_close(answer, expected, rtol=1e-10, atol=1e-12)


def test_views_go_one_after_another_where_other_arguments_have_rows():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny("groupnorm")[0]

        def forward(self, x, offset):
            return self.inner(x) + offset

    x = tiny("groupnorm")[1][0]
    adapted = tt.adapt(Shifted().eval(), ALWAYS)
    assert adapted(x, torch.zeros(ROWS, 1)).shape == (ROWS, 5)


def test_views_that_are_not_used_are_not_made(monkeypatch):
    model, batches = tiny("groupnorm")
    adapted = tt.adapt(model, tt.CoTTA(threshold=0.0))
    monkeypatch.setattr(views, "many", None)
    adapted(batches[0])
    before = adapted.report().forwards
    adapted(batches[0])
    assert adapted.report().forwards - before == 3 * ROWS
