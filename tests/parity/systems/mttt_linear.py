"""The MTTT layer with the linear learner."""

from tests.parity.systems.mttt_mlp import replay

KINDS = {"layer": replay}
