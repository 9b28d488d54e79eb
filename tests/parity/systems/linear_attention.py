"""Linear attention, and softmax attention: the layers that MTTT is measured against."""

from torch import nn

from tests.parity.errors import Comparison
from tests.parity.official import build, check_gradients, expect, gradients, load
from tests.parity.recording import Recording, Unreplayable
from testtime.layers import LinearAttention

_MAPS = {"identity": "identity", "elu+1": "elu"}


def replay(recording: Recording) -> Comparison:
    """Replay one call of linear attention."""
    config = recording.config
    feature_map = config.get("feature_map")
    if feature_map not in _MAPS:
        raise Unreplayable(f"its feature map {feature_map!r} is not known")
    module = build(
        LinearAttention,
        config.get("d"),
        config.get("heads"),
        _MAPS[feature_map],
        config.get("normaliser"),
    )
    return replay_layer(recording, module)


def replay_layer(recording: Recording, module: nn.Module) -> Comparison:
    """Replay one call of a layer [B, N, C] -> [B, N, C] and its gradients."""
    comparison, x = Comparison(recording), recording["in/0/x"].requires_grad_()
    expect(recording, batch=x.shape[0], tokens=x.shape[1])
    load(module, recording)
    y = module(x)
    (y * recording["grad_out/y"]).sum().backward()
    comparison.check("out/0/y", y)
    check_gradients(comparison, recording, {**gradients(module), "x": x.grad})
    return comparison


KINDS = {"layer": replay}
