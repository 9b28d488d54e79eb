"""TTT-MLP, with the authors' constants in the inner derivative of gelu."""

from functools import partial

from tests.parity.systems._ttt import kinds
from testtime.ops.ttt_mlp import ttt_mlp

KINDS = kinds(partial(ttt_mlp, official=True), ("W1", "b1", "W2", "b2"))
