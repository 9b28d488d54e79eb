"""The MTTT layer, with either learner."""

from torch import Tensor

from tests.parity.errors import Comparison
from tests.parity.official import build, check_gradients, expect, gradients, load
from tests.parity.recording import Config, Recording, Unreplayable
from testtime.layers import MTTT, record_inner

# The steps that the authors' code writes out; a fifth is never taken.
OFFICIAL_STEPS = 4


def layer(config: Config, width: int) -> MTTT:
    """Return the layer that a config describes; its first weights are recorded, zeros too."""
    steps, eta = config.get("T"), config.get("eta")
    if (w0 := config.get("w0")) not in ("zero", "learned"):
        raise Unreplayable(f"its w0 {w0!r} is not known")
    made = build(
        MTTT,
        width,
        config.get("heads"),
        learner=config.get("learner"),
        steps=steps,
        inner_lr=eta[: max(steps, 1)] or 1.0,
        sgd=config.get("inner_optimiser") == "sgd",
        learner_bias=config.get("learner_bias"),
        decoder_norm=config.get("decoder_ln"),
        hidden_ratio=config.get("mlp_ratio", 4),
        max_steps=OFFICIAL_STEPS,
    )
    assert isinstance(made, MTTT)
    return made


def replay(recording: Recording) -> Comparison:
    """Replay one call of the layer, its losses, adapted weights and gradients."""
    config, comparison = recording.config, Comparison(recording)
    x = recording["in/0/x"].requires_grad_()
    batch, tokens, width = x.shape
    module = layer(config, config.get("d"))
    load(module, recording)
    expect(recording, ln_eps=1e-6, gelu="tanh", batch=batch, tokens=tokens)
    expect(recording, head_dim=width // module.num_heads)
    order = recording["draw/0/order"] if module.sgd else None
    with record_inner(module, state=True) as record:
        y = module(x, order=order)
    (y * recording["grad_out/y"]).sum().backward()
    ((inner,),) = record.values()
    comparison.check("out/0/y", y)
    by_image = inner.losses.sum(1)
    found: dict[str, Tensor] = {"inner_loss_instance": by_image}
    assert inner.state is not None
    if "weight" in inner.state:
        found["W_T"] = inner.state["weight"]
    if "bias" in inner.state:
        found["b_T"] = inner.state["bias"]
    comparison.check("out/0/inner_loss", by_image.mean(0))
    for name in recording.under("extra/0"):
        comparison.check(f"extra/0/{name}", found.get(name))
    check_gradients(comparison, recording, {**gradients(module), "x": x.grad})
    return comparison


KINDS = {"layer": replay}
