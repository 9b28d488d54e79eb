"""Single rows: the last W of them, to which a method adapts together (ROID, arXiv 2306.00650)."""

import torch
from torch import Tensor

from testtime.adaptation.calls import Call, describe
from testtime.adaptation.state import State


def join(state: State, call: Call, size: int) -> tuple[Call, int]:
    """Return the call of the rows in the window, this call's among them, and its place.

    Args:
        state: holds the window; it is not changed.
        call: of one row.
        size: how many rows the window holds; when full, the oldest makes way.

    Raises:
        ValueError: the rows in the window have another shape.
    """
    held, place = min(state.seen, size), state.seen % size

    def joined(name: str, row: Tensor) -> Tensor:
        rows = state.window[name][:held]
        if rows.shape[1:] != row.shape[1:]:
            raise ValueError(
                f"The window holds rows {list(rows.shape[1:])}, but the input is {describe(row)}. "
                "Give all rows one shape, or reset() in between."
            )
        return torch.cat([rows[:place], row, rows[place + 1 :]])

    rows = call.batched()
    return (call.put({k: joined(str(k), row) for k, row in rows.items()}) if held else call), place


def store(state: State, call: Call, size: int) -> None:
    """Write the row of a call to its place in the window."""
    for key, row in call.batched().items():
        held = state.window.setdefault(str(key), row.new_zeros((size, *row.shape[1:])))
        held[state.seen % size] = row[0].detach()
    state.seen += 1
