"""How far a replay is from its recording, and how far it may be."""

import math
import re

import torch
from torch import Tensor

from tests.parity.recording import Recording

BARS = {torch.float64: 1e-9, torch.float32: 1e-5}

# Zeros of exact arithmetic hold rounding, so no tensor is measured by less than this share of the
# largest entry of its group.
FLOOR = 1e-3


def magnitude(tensor: Tensor) -> float:
    """Return the largest magnitude among a tensor's finite entries."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def relative_error(got: Tensor, recorded: Tensor, largest: float) -> float:
    """Return the error of a tensor; infinite where no number could say it.

    That is ``max|a-b| / max(max|b|, FLOOR * largest)`` for floating recordings. Integers and masks
    are equal or not, values that are not finite likewise, and a scalar may have either shape.

    Args:
        got: the replayed tensor.
        recorded: what the authors' code gave.
        largest: the largest magnitude among the floating tensors of the group.
    """
    if got.shape != recorded.shape and not (got.numel() == recorded.numel() == 1):
        return math.inf
    got, recorded = got.detach().reshape(recorded.shape), recorded.detach()
    if not recorded.is_floating_point():
        return 0.0 if bool((got == recorded).all()) else math.inf
    got, recorded = got.double(), recorded.double()
    finite = recorded.isfinite()
    # First of all, for no comparison with a NaN is true, and a largest error would pass it over.
    if not bool(got[finite].isfinite().all()):
        return math.inf
    if not torch.allclose(got[~finite], recorded[~finite], rtol=0, atol=0, equal_nan=True):
        return math.inf
    off = magnitude(got[finite] - recorded[finite])
    scale = max(magnitude(recorded), FLOOR * largest)
    if off == 0:
        return 0.0
    return off / scale if scale else math.inf


class Comparison:
    """Collects the largest error of each kind of quantity: ``out``, ``state``, ``extra``, ..."""

    def __init__(self, recording: Recording) -> None:
        self.bar = BARS[recording.dtype]
        self.worst: dict[str, tuple[float, str]] = {}
        self._recording = recording
        self._largest: dict[str, float] = {}

    def check(self, name: str, got: Tensor | None) -> None:
        """Hold a replayed tensor against the recorded one; none: the library has no such tensor."""
        recorded = self._recording[name]
        group = name.split("/")[0]
        if group not in self._largest:
            self._largest[group] = max(
                (magnitude(tensor) for tensor in self._recording.floating(group)), default=0.0
            )
        error = math.inf if got is None else relative_error(got, recorded, self._largest[group])
        self._note(group, error, name)

    def require(self, name: str, holds: bool) -> None:
        """Hold a fact that has no number, such as the names of what adapts."""
        if not holds:
            self._note(re.split("[./]", name)[0], math.inf, name)

    def within(self) -> bool:
        """Whether all that was compared is within the bar."""
        return all(error <= self.bar for error, _ in self.worst.values())

    def _note(self, group: str, error: float, name: str) -> None:
        if group not in self.worst or error > self.worst[group][0]:
            self.worst[group] = (error, name)
