"""What an adapted model does beyond its laws: episodes, resets, states, capture-readiness."""

import copy
from dataclasses import dataclass

import pytest
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


def test_a_deep_copy_goes_on_by_itself():
    model, batches = tiny("batchnorm2d")
    adapted = tt.adapt(model, tt.BNAdapt("moving"))
    adapted(batches[0])
    twin = copy.deepcopy(adapted)
    assert torch.equal(twin(batches[1]), adapted(batches[1]))
    twin(batches[0])
    twin.reset()
    assert not torch.equal(twin.predict(batches[1]), adapted.predict(batches[1]))
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    twin(batches[0])
    with pytest.raises(RuntimeError, match="changed in place since"):
        adapted(batches[0])
