"""A stream: data as they come in life, one batch after another. ``streams`` makes them.

It is a list of runs, each a stretch of samples under one shift (or, mixed, under several),
over passes through the data in some order. Everything follows from data, runs, order and seed.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from testtime._suggest import suggest
from testtime.shifts.data import Data
from testtime.shifts.orders import arrange, parse_order
from testtime.shifts.seeds import derive, generator
from testtime.shifts.shift import CLEAN, parse_corruptions, shifted

Shifted = Mapping[str, Data]


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of a stream.

    Args:
        images: float32 ``[B, ...]``; images are in [0, 1].
        labels: ``[B]``, int64, on the CPU, for whoever judges the answers.
        index: ``[B]``, int64, on the CPU, of the samples in their data.
        shifts: of each sample, such as ``fog:5``, ``fog:3+snow:2`` or ``clean``.
        timestamps: ``[B]``, seconds, float64, where the data have them.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    shifts: tuple[str, ...]
    timestamps: Tensor | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def severities(self) -> Tensor:
        """``[B]``, int64: 0 for clean or unknown, of several corruptions the greatest."""
        return torch.tensor([severity(shift) for shift in self.shifts])


class Run(NamedTuple):
    """Samples ``start`` to ``start + samples`` of all passes over the data, under these shifts."""

    shifts: tuple[str, ...]
    start: int
    samples: int


@dataclass(frozen=True, eq=False)
class Stream:
    """Batches in a fixed sequence; made by the functions of ``streams``.

    >>> from testtime import demo
    >>> digits = Data("digits", *demo.digits("test"), sha256=demo.sha256())
    >>> from testtime.shifts import continual
    >>> stream = continual(digits, ["fog:5", "contrast:5"], batch_size=200, seed=1)
    >>> len(stream), stream.samples, stream.shifts
    (8, 1594, ('fog:5', 'contrast:5'))
    >>> [len(batch) for batch in stream]
    [200, 200, 200, 197, 200, 200, 200, 197]

    It can be iterated again and again, and yields the same to the byte. A batch never reaches over
    the end of a run, so all its samples are under one shift unless the stream is mixed. Images do
    not depend on the batch size.

    Args:
        protocol: the name of the function that made it.
        data: what the samples are of, or data for each shift, already shifted.
        runs: what comes, in turn.
        order: of the samples in a pass; see ``arrange``.
        batch_size: samples a batch, except for the last of a run.
        seed: of order, corruptions and whatever else is drawn.
        device: where images are corrupted and end up.
        saved: indices and numbers of shifts of all samples, read back from a file.

    Raises:
        ValueError: a shift, the order or the batch size is not possible.
    """

    protocol: str
    data: Data | Shifted = field(repr=False)
    runs: tuple[Run, ...] = field(repr=False)
    order: str = "shuffled"
    batch_size: int = 64
    seed: int = 0
    device: str = "cpu"
    saved: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"A batch has at least 1 sample, found {self.batch_size}.")
        if not self.runs:
            raise ValueError("The stream is empty. Give at least one shift, and one pass.")
        parse_order(self.order)
        for shift in self.shifts:
            if data_of(self.data, shift) is self.data:
                parse_corruptions(shift)
        for run in self.runs:
            counts = {shift: len(data_of(self.data, shift)) for shift in run.shifts}
            if len(set(counts.values())) > 1:
                raise ValueError(
                    "Data that are mixed need the same samples under each shift, found "
                    + ", ".join(f"{count} ({shift})" for shift, count in counts.items())
                    + ". Stream others one after the other, with continual."
                )

    @property
    def shifts(self) -> tuple[str, ...]:
        """The shifts in the order of their first appearance, each once."""
        return tuple(dict.fromkeys(shift for run in self.runs for shift in run.shifts))

    @property
    def samples(self) -> int:
        """The number of samples."""
        return sum(run.samples for run in self.runs)

    def __len__(self) -> int:
        """The number of batches."""
        return sum(-(-run.samples // self.batch_size) for run in self.runs)

    def __iter__(self) -> Iterator[Batch]:
        source = lru_cache(maxsize=32)(self._source)
        for index, shifts in self.plan():
            yield _read(source, index, shifts)

    def plan(self) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        """Yield index and shifts of each batch without reading a sample."""
        order = lru_cache(maxsize=2)(self._order)
        before = 0
        for run in self.runs:
            for start in range(0, run.samples, self.batch_size):
                stop = min(start + self.batch_size, run.samples)
                if self.saved is not None:
                    index, which = (part[before + start : before + stop] for part in self.saved)
                else:
                    index, which = self._draw(order, run, run.start + start, run.start + stop)
                yield index, tuple(run.shifts[i] for i in which.tolist())
            before += run.samples

    def describe(self) -> dict[str, Any]:
        """Say what the stream is, as plain values for a row of results."""
        return {
            "protocol": self.protocol,
            "order": self.order,
            "seed": self.seed,
            "device": self.device,
            "batch_size": self.batch_size,
            "batches": len(self),
            "samples": self.samples,
            "shifts": list(self.shifts),
            "data": self.data.fingerprint()
            if isinstance(self.data, Data)
            else {shift: self.data[shift].fingerprint() for shift in self.shifts},
        }

    def save(self, path: str | Path) -> None:
        """Write what the stream yields, without the samples: whole, or not at all.

        The file (safetensors) holds the index and shift of every sample, so that the same stream
        can be had even where a later version draws differently. ``load_stream`` reads it.

        Raises:
            OSError: it could not be written.
        """
        from safetensors.torch import save

        planned = list(self.plan())
        numbers = {shift: i for run in self.runs for i, shift in enumerate(run.shifts)}
        tensors = {
            "index": torch.cat([index for index, _ in planned]).int(),
            "shift": torch.tensor([numbers[s] for _, shifts in planned for s in shifts]).short(),
        }
        about = {**self.describe(), "runs": [run._asdict() for run in self.runs]}
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_bytes(save(tensors, metadata={"stream": json.dumps(about)}))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _source(self, shift: str) -> Data:
        if isinstance(self.data, Data):
            return shifted(self.data, shift, seed=self.seed, device=self.device)
        return shifted(self.data[shift], CLEAN, device=self.device)

    def _order(self, shift: str, number: int) -> Tensor:
        labels = data_of(self.data, shift).labels
        return arrange(self.order, labels, derive(self.seed, "order", number))

    def _draw(
        self, order: Callable[[str, int], Tensor], run: Run, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        count = len(data_of(self.data, run.shifts[0]))
        # The order doesn't depend on the corruption: one is made for all of them.
        of = "" if isinstance(self.data, Data) else run.shifts[0]
        passes = torch.arange(start, stop) // count
        index = torch.cat(
            [
                order(of, number)[max(start - number * count, 0) : stop - number * count]
                for number in range(start // count, (stop - 1) // count + 1)
            ]
        )
        if len(run.shifts) == 1:
            return index, torch.zeros_like(index)
        # Each sample starts at a shift of its own and takes the next one in the next pass.
        first = torch.randint(
            len(run.shifts), (count,), generator=generator(derive(self.seed, "mixed"))
        )
        return index, (first[index] + passes) % len(run.shifts)


def load_stream(path: str | Path, data: Data | Shifted) -> Stream:
    """Read a stream that was saved, over the same data.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no stream, or one over other data.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Give one that Stream.save wrote.")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["stream"])
            saved = file.get_tensor("index").long(), file.get_tensor("shift").long()
        runs = tuple(
            Run(tuple(run["shifts"]), run["start"], run["samples"]) for run in about["runs"]
        )
        stream = Stream(
            about["protocol"],
            data,
            runs,
            about["order"],
            about["batch_size"],
            about["seed"],
            about["device"],
            saved,
        )
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no stream that was saved whole ({error}).") from error
    found = stream.describe()["data"]
    if found != about["data"]:
        raise ValueError(f"{path} is a stream over other data: {about['data']}. Found {found}.")
    return stream


def severity(shift: str) -> int:
    """Return the greatest severity in the name of a shift, 0 if there is none."""
    levels = [part.rpartition(":")[2] for part in shift.split("+") if ":" in part]
    return max((int(level) for level in levels if level.isdecimal()), default=0)


def data_of(data: Data | Shifted, shift: str) -> Data:
    """Return the data that a shift is of: the same for all, or its own.

    Raises:
        ValueError: there are none for this shift.
        TypeError: it is something else than data.
    """
    if isinstance(data, Mapping) and shift not in data:
        raise ValueError(
            f"There are no data for the shift '{shift}' (there are for: {', '.join(data)})."
            f"{suggest(shift, data)}"
        )
    found: object = data[shift] if isinstance(data, Mapping) else data
    if not isinstance(found, Data):
        raise TypeError(
            f"Streams are of Data, found {type(found).__name__}. Read it first, with read_pairs."
        )
    return found


def _read(source: Callable[[str], Data], index: Tensor, shifts: tuple[str, ...]) -> Batch:
    """Read the samples of one batch, those of one shift together, and put them in their places."""
    places = {
        shift: torch.tensor([i for i, other in enumerate(shifts) if other == shift])
        for shift in dict.fromkeys(shifts)
    }
    parts = [(source(shift), index[at]) for shift, at in places.items()]
    back = torch.cat([*places.values()]).argsort()
    images = torch.cat([data.samples[part.tolist()] for data, part in parts])
    labels = torch.cat([data.labels[part] for data, part in parts])
    stamps = [data.timestamps[part] for data, part in parts if data.timestamps is not None]
    return Batch(
        images[back.to(images.device)],
        labels[back],
        index,
        shifts,
        torch.cat(stamps)[back] if len(stamps) == len(parts) else None,
    )
