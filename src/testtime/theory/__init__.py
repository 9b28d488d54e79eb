"""Why test-time training helps, and when it does not: linear models in closed form.

>>> from testtime import theory
>>> curve = theory.simulate(angle=0.6, alphas=[0, 0.05, 0.13, 0.5], draws=20_000, seed=0)
>>> curve.best
0.13
"""

from testtime.theory.gradients import Alignment, align
from testtime.theory.linear import (
    Curve,
    Setting,
    encoder,
    mixed,
    prediction,
    ratio_needed,
    simulate,
    slope_at_zero,
    why_none,
)
from testtime.theory.subspace import subspace_errors
from testtime.theory.video import best_window, excess_loss

__all__ = [
    "Alignment",
    "Curve",
    "Setting",
    "align",
    "best_window",
    "encoder",
    "excess_loss",
    "mixed",
    "prediction",
    "ratio_needed",
    "simulate",
    "slope_at_zero",
    "subspace_errors",
    "why_none",
]
