"""Whether a row's answer depends on the rows beside it: measured, not declared."""

from typing import TYPE_CHECKING

import torch

from testtime.adaptation.calls import Call

if TYPE_CHECKING:
    from testtime.adaptation.learner import Learner

_HALF = (torch.float16, torch.bfloat16)


def measure(learner: "Learner", call: Call) -> None:
    """Find out whether a row's answer depends on the row beside it, by trying; once."""
    if learner.couples is not None or call.x.shape[0] < 2:
        return
    pair, x = call.rows(slice(0, 2)), call.x
    if torch.equal(x[0], x[1]):  # a neighbour like oneself shows nothing
        other = x[:1] * 0.5 + 0.1 if x.is_floating_point() else x[:1].roll(1, -1)
        pair = pair.at(torch.cat([x[:1], other]))
    try:
        beside, alone = learner.predict(pair)[:1], learner.predict(call.rows(slice(0, 1)))
    except Exception as error:  # of the model's own, for it may not take one or two rows
        learner.couples = None
        learner.predict(call)  # what is wrong with the whole batch is raised as it is
        learner.couples = True  # the careful answer, and that of statistics that one row lacks
        if not str(error).startswith(type(learner.method).__name__):
            learner.say(
                "Whether a row's answer depends on the rows beside it could not be measured: "
                f"the model does not take one or two rows ({type(error).__name__}). It is "
                "taken to depend on them."
            )
        return
    # Kernels differ by batch size, in their last digits only; NaN is no agreement.
    digits = 0.05 if alone.dtype in _HALF else 1e-4
    gap = (beside - alone).abs().max()
    learner.couples = not bool(gap <= digits * beside.abs().max())
