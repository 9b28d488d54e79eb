"""TTT-Linear."""

from tests.parity.systems._ttt import kinds
from testtime.ops.ttt_linear import ttt_linear

KINDS = kinds(ttt_linear, ("W1", "b1"))
