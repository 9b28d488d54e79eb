"""Adapt a trained model to shifted data, without labels, while it is used.

Everything that a method of your own needs is here.
"""

from testtime.adaptation import objectives, optim, select
from testtime.adaptation.core import Draw, Method, Net, Objective, Settled
from testtime.adaptation.learner import Learner
from testtime.adaptation.optim import SGD, Adam, Tensors

__all__ = [
    "SGD",
    "Adam",
    "Draw",
    "Learner",
    "Method",
    "Net",
    "Objective",
    "Settled",
    "State",
    "Tensors",
    "objectives",
    "optim",
    "select",
]
