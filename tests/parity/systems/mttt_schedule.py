"""The multiplier of the rate."""

import torch

from tests.parity.errors import Comparison
from tests.parity.official import expect
from tests.parity.recording import Recording
from testtime.train.mttt import warmup_cosine


def replay(recording: Recording) -> Comparison:
    """Replay the multiplier at every recorded step."""
    config, comparison = recording.config, Comparison(recording)
    expect(recording, decay="cosine")
    total, warmup = config.get("total_steps"), config.get("warmup_steps")
    steps = recording["in/step"].tolist()
    got = torch.tensor([warmup_cosine(step, total, warmup) for step in steps])
    comparison.check("out/multiplier", got)
    return comparison


KINDS = {"operator": replay}
