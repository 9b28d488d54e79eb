"""Mixup of one batch."""

from tests.parity.errors import Comparison
from tests.parity.official import expect
from tests.parity.recording import Recording
from testtime.train.mttt import mixup


def replay(recording: Recording) -> Comparison:
    """Replay one batch under its recorded weights, which were drawn at ``p``."""
    comparison = Comparison(recording)
    expect(recording, n=2)
    recording.config.get("p")
    x, labels = mixup(recording["in/x"], recording["in/labels"], recording["draw/alpha"])
    comparison.check("out/x", x)
    comparison.check("out/labels", labels)
    return comparison


KINDS = {"operator": replay}
