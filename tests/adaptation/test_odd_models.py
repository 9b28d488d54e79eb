"""Models that are built in unusual ways: each works with TENT, or is refused with a sentence."""

import torch

import testtime as tt
from testtime.models.tiny import tiny


def test_built_and_moved_within_inference_mode():
    model, batches = tiny("batchnorm2d")
    with torch.inference_mode():
        adapted = tt.adapt(model, "tent").to("cpu")
        other = tt.adapt(model, "tent")
        other.load_state_dict(adapted.state_dict())
    for one in (adapted, other):
        assert torch.equal(one(batches[0]), tt.adapt(model, "tent")(batches[0]))


def test_group_norm_after_frozen_channels_last_layers():
    model, batches = tiny("groupnorm")
    plain = tt.adapt(model, "tent")(batches[0])
    model.to(memory_format=torch.channels_last)
    assert torch.allclose(tt.adapt(model, "tent")(batches[0]), plain, atol=1e-6)
