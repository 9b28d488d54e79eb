"""Multi-head softmax attention."""

from tests.parity.errors import Comparison
from tests.parity.official import build, expect
from tests.parity.recording import Recording
from tests.parity.systems.linear_attention import replay_layer
from testtime.layers import SoftmaxAttention


def replay(recording: Recording) -> Comparison:
    """Replay one call of softmax attention."""
    config = recording.config
    expect(recording, scale="1/sqrt(head_dim)")
    return replay_layer(recording, build(SoftmaxAttention, config.get("d"), config.get("heads")))


KINDS = {"layer": replay}
