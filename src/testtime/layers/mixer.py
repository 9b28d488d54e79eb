"""Mixing layers by name, as papers name them."""

from collections.abc import Callable
from typing import Any

from torch import nn

from testtime._suggest import suggest
from testtime.layers.attention import LinearAttention, SoftmaxAttention
from testtime.layers.mttt import MTTT
from testtime.layers.vittt import ViTTT

# Each name: a layer, and what it is built with beside width and heads.
MIXERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "softmax": (SoftmaxAttention, {}),
    "linear": (LinearAttention, {}),
    "linear-elu": (LinearAttention, {"feature_map": "elu", "normalizer": "adaptive"}),
    "mttt-linear": (
        MTTT,
        {"learner": "linear", "w0": "zero", "learner_bias": False, "decoder_norm": False},
    ),
    "mttt-mlp": (MTTT, {}),
    "mttt-mlp-sgd4": (MTTT, {"steps": 4, "sgd": True}),
    "vittt": (ViTTT, {}),
}


def mixer(name: str, dim: int, num_heads: int, **changes: Any) -> nn.Module:
    """Return a layer ``[B, N, C] -> [B, N, C]`` by the name of its published preset.

    >>> layer = mixer("mttt-mlp", 192, 3, steps=4)

    Args:
        name: a key of ``MIXERS``.
        dim: C.
        num_heads: H.
        changes: arguments of the layer, in place of the preset's.

    Raises:
        ValueError: there is no such name, or the layer refuses an argument.
    """
    if name not in MIXERS:
        raise ValueError(
            f"There is no mixer '{name}' (known: {', '.join(MIXERS)}).{suggest(name, MIXERS)}"
        )
    build, preset = MIXERS[name]
    return build(dim, num_heads, **{**preset, **changes})
