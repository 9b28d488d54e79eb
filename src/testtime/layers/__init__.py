"""Layers that learn as they read: modules around the operators, and drop-ins for attention."""

from testtime.layers.attention import LinearAttention, SoftmaxAttention
from testtime.layers.mixer import MIXERS, mixer
from testtime.layers.mttt import MTTT
from testtime.layers.official import from_official, to_official
from testtime.layers.record import record_inner
from testtime.layers.replace import replace_attention
from testtime.layers.vittt import ViTTT

__all__ = [
    "MIXERS",
    "MTTT",
    "LinearAttention",
    "SoftmaxAttention",
    "ViTTT",
    "from_official",
    "mixer",
    "record_inner",
    "replace_attention",
    "to_official",
]
