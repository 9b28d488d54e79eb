"""What an adapted model does beyond its laws: episodes, resets, states, capture-readiness."""

from dataclasses import dataclass

import torch

import testtime as tt
from testtime.models.tiny import tiny


@dataclass(frozen=True)
class Anchored(tt.Method):
    """Keeps the mean of the first batch, and answers relative to it."""

    def begin(self, net, x, draw):
        return {"first": net(x).mean(0) + draw("noise", lambda g: torch.randn((), generator=g))}

    def predict(self, net, x, memory):
        return net(x) - memory["first"]


def test_looking_begins_nothing():
    model, batches = tiny("batchnorm2d")
    adapted, looked = tt.adapt(model, Anchored()), tt.adapt(model, Anchored())
    looked.predict(batches[1])
    looked.reset()
    assert torch.equal(looked(batches[0]), adapted(batches[0]))
    expected = model(batches[0]).mean(0)
    noise = torch.randn((), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(adapted.learner.state.memory["first"], expected + noise)


@dataclass(frozen=True)
class Remembering(tt.Method):
    def begin(self, net, x, draw):
        return {"mean": torch.zeros(5)}

    def loss(self, net, x, memory, draw):
        logits = net(x)
        return tt.Objective(logits=logits, memory={"mean": logits.mean(0)})


def test_a_loaded_state_stays_as_it_was():
    model, batches = tiny("batchnorm2d")
    adapted = tt.adapt(model, Remembering())
    adapted(batches[0])
    state = adapted.state_dict()
    before = {k: t.clone() for k, t in state.items()}
    adapted.load_state_dict(state)
    adapted(batches[1])
    assert all(torch.equal(t, before[k]) for k, t in state.items())
