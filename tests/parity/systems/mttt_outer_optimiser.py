"""The optimiser of the outer loop, step by step on recorded gradients."""

import torch

from tests.parity.errors import Comparison
from tests.parity.official import expect
from tests.parity.recording import Recording
from testtime.train.mttt import OfficialAdam, warmup_cosine


def replay(recording: Recording) -> Comparison:
    """Replay all steps; the decay of the config is added behind the rate."""
    config, comparison = recording.config, Comparison(recording)
    expect(recording, first_moment="bfloat16", steps=len(recording.steps()))
    lr, trains = config.get("lr"), config.get("train_w0")
    params = {n: recording[f"init/{n}"].clone() for n in recording.under("init")}
    trained = {n: p for n, p in params.items() if trains or "/inner" not in n}
    kernels = [p for n, p in trained.items() if n.endswith("kernel")]
    others = [p for n, p in trained.items() if not n.endswith("kernel")]
    optimizer = OfficialAdam(
        [
            {"params": kernels, "weight_decay": config.get("weight_decay") / lr},
            {"params": others, "weight_decay": 0.0},
        ],
        lr,
        (config.get("beta1"), config.get("beta2")),
        config.get("eps"),
        clip=config.get("clip"),
    )
    total, warmup = config.get("total_steps"), config.get("warmup_steps")
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, total, warmup)
    )
    for step in recording.steps():
        for name in recording.under(f"in/{step}/grad"):
            params[name].grad = recording[f"in/{step}/grad/{name}"]
        for name, p in params.items():
            if name not in trained:
                p.grad = None
        optimizer.step()
        schedule.step()
        for name in recording.under(f"state/{step}"):
            comparison.check(f"state/{step}/{name}", params.get(name))
    return comparison


KINDS = {"steps": replay}
