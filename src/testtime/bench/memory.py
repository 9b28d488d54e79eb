"""Peak memory of a piece of work."""

from pathlib import Path
from typing import Self

import torch


class Peak:
    """Measures, as a context, how much memory was taken above what was held before.

    ``mib`` is what torch allocated on a GPU; on the CPU the growth of the process, which takes in
    what the allocator keeps and exists on Linux alone; elsewhere none.
    """

    def __init__(self, device: str) -> None:
        self._gpu = torch.device(device) if device.startswith("cuda") else None
        self.mib: float | None = None

    def __enter__(self) -> Self:
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)
            self._before: float | None = torch.cuda.memory_allocated(self._gpu) / 2**20
        else:
            self._before = _begin()
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu is not None:
            peak: float | None = torch.cuda.max_memory_allocated(self._gpu) / 2**20
        else:
            peak = _status("VmHWM")
        if peak is not None and self._before is not None:
            self.mib = round(max(peak - self._before, 0.0), 1)


def _begin() -> float | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        return None
    return _status("VmRSS")


def _status(what: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith(f"{what}:")), None)
    return None if kib is None else int(kib) / 1024
