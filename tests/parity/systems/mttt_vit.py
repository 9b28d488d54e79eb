"""The vision transformer that hosts MTTT, as a whole."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.errors import Comparison
from tests.parity.official import build, check_gradients, expect, gradients, load
from tests.parity.recording import Config, Recording, Unreplayable
from tests.parity.systems import mttt_mlp
from testtime.layers import MTTT, LinearAttention, SoftmaxAttention, record_inner
from testtime.models import ViT


def mixing(config: Config, width: int, heads: int) -> nn.Module:
    """Return the mixing layer that a config describes."""
    kind = config.get("layer")
    if kind == "TTT":
        return mttt_mlp.layer(config, width)
    if kind == "LinearAttention":
        elu = config.get("elu", False)
        return build(
            LinearAttention,
            width,
            heads,
            "elu" if elu else "identity",
            config.get("normalizer", "constant"),
        )
    if kind in ("MultiHeadDotProductAttention", "self_attention"):
        return build(SoftmaxAttention, width, heads)
    raise Unreplayable(f"its layer {kind!r} is not known")


def replay(recording: Recording) -> Comparison:
    """Replay one forward, the loss and every gradient."""
    config, comparison = recording.config, Comparison(recording)
    width, heads = config.get("width"), config.get("heads")
    x = recording["in/0/x"].to(recording.dtype).permute(0, 3, 1, 2)
    expect(recording, image=x.shape[-1])
    posemb = config.get("posemb")
    model = build(
        ViT,
        lambda dim, num_heads: mixing(config, width, heads),
        image_size=(x.shape[2], x.shape[3]),
        patch_size=config.get("patch"),
        dim=width,
        depth=config.get("depth"),
        num_heads=heads,
        mlp_dim=config.get("mlp_dim"),
        num_classes=config.get("classes"),
        pos_embed=posemb,
    )
    assert isinstance(model, ViT)
    load(model, recording)
    # The table is rounded to single precision, whatever the rest runs in.
    if posemb == "sincos2d":
        model.register_buffer("pos_embed", model.pos_embed.to(recording.dtype), persistent=False)
    for i, block in enumerate(model.blocks):
        if f"draw/0/order_{i}" in recording:
            _give(block.attn, recording[f"draw/0/order_{i}"])
    # Layers without an inner loop give two infinities in the place of losses.
    losses = torch.full((len(model.blocks), 2), torch.inf)
    if any(isinstance(block.attn, MTTT) for block in model.blocks):
        with record_inner(model) as record:
            logits = model(x)
        losses = torch.stack([inner.losses.sum(1).mean(0) for (inner,) in record.values()])
    else:
        logits = model(x)
    loss = -(recording["in/0/labels"] * F.log_softmax(logits, -1)).sum(-1).mean()
    loss.backward()
    comparison.check("out/0/logits", logits)
    comparison.check("out/0/loss", loss)
    comparison.check("out/0/inner_loss", losses)
    if "extra/0/pos_embedding" in recording:
        comparison.check("extra/0/pos_embedding", model.pos_embed)
    check_gradients(comparison, recording, gradients(model))
    return comparison


def _give(layer: nn.Module, order: Tensor) -> None:
    """Let a layer take a recorded order in place of its own."""

    def add(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "order": order}

    layer.register_forward_pre_hook(add, with_kwargs=True)


KINDS = {"model": replay}
