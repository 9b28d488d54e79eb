"""MTTT: a small learner fitted to the tokens of each image, inside the forward pass."""

from testtime.ops.mttt.dispatch import FORMS, chosen_form, mttt
from testtime.ops.mttt.objectives import Decoder, Dot
from testtime.ops.mttt.problem import random_order

__all__ = ["FORMS", "Decoder", "Dot", "chosen_form", "mttt", "random_order"]
