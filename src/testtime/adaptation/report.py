"""What an adapted model has done so far."""

from dataclasses import dataclass, field

from testtime.adaptation.core import Method


@dataclass(frozen=True)
class Report:
    """What an adapted model has done so far.

    Args:
        method: the method with its hyper-parameters.
        adapts: names of the tensors that may change.
        share: adapting parameters' share of all, from 0 to 1.
        unused: adapting parameters that turned out to have no influence on the answer.
        couples: whether a row's answer depends on the rows beside it; none until measured.
        batches: batches since the start or the last reset.
        skipped: batches (samples, where each is an episode) that were not finite and changed
            nothing, of all since it was built.
        forwards: images that went forward, looks of the first batch included.
        backwards: images that went backward.
        said: everything that was chosen, approximated or left out.
    """

    method: Method
    adapts: tuple[str, ...]
    share: float
    unused: tuple[str, ...]
    couples: bool | None
    batches: int
    skipped: int
    forwards: int
    backwards: int
    said: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        """Return the report in lines to read."""
        couples = {None: "not measured yet", True: "yes", False: "no"}[self.couples]
        lines = [
            f"method     {self.method}",
            f"adapts     {len(self.adapts)} tensors, {self.share:.2%} of the parameters",
            f"unused     {', '.join(self.unused) or 'none'}",
            f"batches    {self.batches} since the last reset; {self.skipped} skipped, not finite",
            f"cost       {self.forwards} images forward, {self.backwards} backward",
            f"couples    rows of a batch: {couples}",
            *(f"said       {sentence}" for sentence in self.said),
        ]
        return "\n".join(lines)
