"""What the operator refuses, before anything is computed."""

import pytest
import torch
from torch import nn

from tests.ops.mttt_inputs import GRID, inputs
from testtime.ops.mttt import Decoder, Dot, mttt


class Widens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 5))

    def forward(self, u):
        return u @ self.weight


def call(known="mlp", /, **changes):
    given = inputs(known)
    named = dict(zip(("q", "k", "x", "w0", "decoder"), given[:5], strict=True))
    return mttt(**{**named, "learner": known, **changes})


ORDER = torch.arange(13)
MASK = torch.zeros(2, 13, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learner": "mpl", "w0": {}}, "no learner 'mpl'.*Did you mean 'mlp'"),
        ({"steps": -1}, "steps is -1"),
        ({"max_steps": -1}, "max_steps -1"),
        ({"steps": 14, "order": ORDER}, "13 tokens cannot be cut into 14 blocks"),
        ({"inner_lr": (1.0, 1.0)}, "2 rates for 1 steps"),
        ({"inner_lr": ()}, "0 rates for 1 steps"),
        ({"inner_lr": torch.ones(())}, r"shape \[\]"),
        ({"inner_lr": torch.ones(1, 2)}, r"shape \[1, 2\]; give \[T\] or \[T, 3\]"),
        ({"q": torch.zeros(2, 3, 13, 5)}, r"q is \[2, 3, 13, 5\]"),
        ({"k": torch.zeros(2, 3, 0, 4), "q": torch.zeros(2, 3, 2, 4)}, "no tokens"),
        ({"x": torch.zeros(2, 13, 9)}, r"x is \[2, 13, 9\]"),
        ({"decoder": Decoder(torch.zeros(3, 4, 10), torch.zeros(9))}, r"bias is \[9\]"),
        (
            {"decoder": Decoder(torch.zeros(3, 4, 10), torch.zeros(10), torch.ones(3, 10))},
            "shift is None",
        ),
        ({"decoder": Dot(squash=False)}, "Under Dot x is values like k"),
        ({"w0": {"weight_1": torch.zeros(3, 4, 16)}}, "called weight_1, bias_1"),
        (
            {"w0": {"weight_1": torch.zeros(3, 4, 16), "weight_2": torch.zeros(3, 16, 5)}},
            "must keep a token's width",
        ),
        (
            {"w0": {"weight_1": torch.zeros(2, 4, 16), "weight_2": torch.zeros(2, 16, 4)}},
            r"begins with \[3\]",
        ),
        ({"order": ORDER.float()}, "order is torch.float32"),
        ({"order": ORDER[1:]}, r"shape \[12\]"),
        ({"order": ORDER.clamp(max=3)}, "no permutation"),
        ({"key_padding_mask": MASK.float()}, "key_padding_mask is torch.float32"),
        ({"key_padding_mask": MASK[:1]}, r"shape \[1, 13\]"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"form": "naive"}, "no form 'naive'"),
        ({"form": "moments"}, "one step of the linear learner"),
        ({"learner": "glu", "form": "narrow"}, "under a Decoder only"),
        ({"learner": "dwconv"}, r"grid None does not hold 15 tokens"),
        ({"learner": "dwconv", "grid": (4, 4)}, r"grid \(4, 4\) does not hold 15"),
        ({"learner": "dwconv", "grid": GRID, "order": torch.arange(15)}, "whole grid"),
        ({"learner": "linear", "decoder": Dot(), "x": torch.zeros(2, 3, 13, 4)}, "which a bias"),
        ({"learner": Widens(), "w0": {"weight": torch.zeros(3, 4, 5)}}, "keep their number and"),
        ({"learner": Widens(), "w0": {}}, "called weight; found"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_it_is_refused_in_words(changes, says):
    learner = changes.get("learner")
    with pytest.raises(ValueError, match=says):
        call(learner if learner in ("linear", "glu", "dwconv") else "mlp", **changes)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"torch\.int64"):
        call(q=torch.zeros(2, 3, 13, 4, dtype=torch.int64))
