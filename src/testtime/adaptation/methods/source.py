"""Source: the model as it was trained, in eval mode. What every method is held against."""

from dataclasses import dataclass

from testtime.adaptation.core import Method


@dataclass(frozen=True)
class Source(Method):
    """The unadapted model: nothing changes, one forward a batch."""

    cost = (1, 0)
