"""Streams: data as they come in life, one batch after another.

A stream is a list of runs, each a stretch of samples under one shift (or, mixed, under several),
over passes through the data in some order. Everything follows from data, runs, order and seed.
"""

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

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
        labels: ``[B]``, int64, for whoever judges the answers.
        index: ``[B]``, int64, of the samples in their data.
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


class InOrder(TypedDict, total=False):
    """What every builder takes besides its own arguments: see ``Stream``."""

    batch_size: int
    seed: int
    device: str


class Options(InOrder, total=False):
    """What all builders but ``natural`` take besides."""

    order: str


class Run(NamedTuple):
    """Samples ``start`` to ``start + samples`` of all passes over the data, under these shifts."""

    shifts: tuple[str, ...]
    start: int
    samples: int


@dataclass(frozen=True, eq=False)
class Stream:
    """Batches in a fixed sequence; made by the functions of this module.

    >>> from testtime import demo
    >>> digits = Data("digits", *demo.digits("test"), sha256=demo.sha256())
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
            if isinstance(self.data, Data):
                parse_corruptions(shift)
            else:
                _known(self.data, shift)
        for run in self.runs:
            if len({len(self._data(shift)) for shift in run.shifts}) > 1:
                raise ValueError(
                    "Data that are mixed need the same samples under each shift, found "
                    + ", ".join(f"{len(self._data(shift))} ({shift})" for shift in run.shifts)
                    + ". Mix others one after the other, with continual."
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

    def _data(self, shift: str) -> Data:
        return self.data if isinstance(self.data, Data) else self.data[shift]

    def _source(self, shift: str) -> Data:
        if isinstance(self.data, Data):
            return shifted(self.data, shift, seed=self.seed, device=self.device)
        return shifted(self.data[shift], CLEAN, device=self.device)

    def _order(self, shift: str, number: int) -> Tensor:
        return arrange(self.order, self._data(shift).labels, derive(self.seed, "order", number))

    def _draw(
        self, order: Callable[[str, int], Tensor], run: Run, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        count = len(self._data(run.shifts[0]))
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


def single(data: Data | Shifted, shift: str = CLEAN, **options: Unpack[Options]) -> Stream:
    """Stream the data once, under one shift.

    The options of this and all other builders are ``order``, ``batch_size``, ``seed`` and
    ``device`` of ``Stream``.
    """
    return Stream("single", data, _passes(data, [shift]), **options)


def natural(data: Data | Shifted, shift: str = CLEAN, **options: Unpack[InOrder]) -> Stream:
    """Stream the data once in their own order, which is time.

    Raises:
        ValueError: the timestamps go back.
    """
    stamps = data.timestamps if isinstance(data, Data) else data[_known(data, shift)].timestamps
    if stamps is not None and (back := stamps.diff() < 0).any():
        raise ValueError(
            f"The timestamps go back {int(back.sum())} times, first at sample "
            f"{int(back.nonzero()[0]) + 1}. Sort the data by them, with take."
        )
    return Stream("natural", data, _passes(data, [shift]), order="natural", **options)


def continual(
    data: Data | Shifted, shifts: Sequence[str] | None = None, **options: Unpack[Options]
) -> Stream:
    """Stream the data once under each shift, one shift after the other.

    Args:
        data: what is corrupted; or data for each shift, such as those of a released benchmark.
        shifts: in turn, such as ``["fog:5", "snow:5"]``. Of data for each shift all, if not given.
        options: see ``single``.

    Source: Wang et al., "Continual test-time domain adaptation", CVPR 2022.
    """
    return Stream("continual", data, _passes(data, _shifts(data, shifts)), **options)


def gradual(
    data: Data | Shifted,
    names: Sequence[str],
    severities: Sequence[int] = (1, 2, 3, 4, 5, 4, 3, 2, 1),
    **options: Unpack[Options],
) -> Stream:
    """Stream the data under corruptions that grow and fade, a pass for each severity.

    CoTTA's own code begins with the first corruption at its height (5, 4, 3, 2, 1): give that list
    to ``continual``.

    Source: Wang et al., "Continual test-time domain adaptation", CVPR 2022.
    """
    shifts = [f"{name}:{level}" for name in names for level in severities]
    return Stream("gradual", data, _passes(data, shifts), **options)


def repeating(
    data: Data | Shifted,
    shifts: Sequence[str] | None = None,
    *,
    times: int = 20,
    **options: Unpack[Options],
) -> Stream:
    """Stream the data under each shift, one after the other, and all of it again and again.

    Each pass has an order of its own; an image under one shift is the same every time.

    Source: Hoang et al., "Persistent test-time adaptation in recurring testing scenarios", NeurIPS
    2024, with 20 times.
    """
    return Stream("repeating", data, _passes(data, [*_shifts(data, shifts)] * times), **options)


def mixed(
    data: Data | Shifted,
    shifts: Sequence[str] | None = None,
    *,
    passes: int | None = None,
    **options: Unpack[Options],
) -> Stream:
    """Stream the data with a shift for each sample, drawn evenly.

    In the next pass a sample comes under another shift; after as many passes as there are shifts,
    which is what is streamed if ``passes`` is not given, it has come under each once.

    Source: Niu et al., "Towards stable test-time adaptation in dynamic wild world", ICLR 2023.
    """
    chosen = tuple(_shifts(data, shifts))
    count = len(data) if isinstance(data, Data) else len(data[_known(data, *chosen)])
    total = count * (len(chosen) if passes is None else passes)
    return Stream("mixed", data, (Run(chosen, 0, total),) if total else (), **options)


def slow(
    data: Data,
    names: Sequence[str],
    *,
    samples: int = 7_500_000,
    step: int = 1000,
    severity: int = 5,
    **options: Unpack[Options],
) -> Stream:
    """Stream the data for long, while one corruption fades and the next one grows.

    From ``fog:5`` over ``fog:4+snow:1``, ``fog:3+snow:2`` and so on to ``snow:5``, then towards
    another one, drawn at random. It is made in the manner of CCC, and not CCC: that steps by
    quarters of a severity, along paths on which a model's accuracy was measured to stay about the
    same, and crops and flips at random. Here steps are whole, and the sum of both severities stays.

    Passes over the data follow one another, each in an order of its own. A stream of 7.5 million
    samples holds a list of its steps, and the order of one pass.

    Args:
        data: what is corrupted.
        names: of two corruptions or more.
        samples: how many in all; CCC has 7.5 million.
        step: samples under each mixture; CCC has 1000, 2000 or 5000.
        severity: sum of the two severities, 1 to 5.
        options: see ``single``.

    Source: Press et al., "RDumb: a simple approach that questions our progress in continual
    test-time adaptation", NeurIPS 2023.
    """
    if len(set(names)) < 2 or step < 1 or samples < 1 or severity not in range(1, 6):
        raise ValueError(
            "A slow stream goes from one corruption to another: give two names or more, steps and "
            f"samples of at least 1, and a severity from 1 to 5. Found {len(set(names))} names, "
            f"step {step}, {samples} samples, severity {severity}."
        )
    walk = _walk(names, severity, random.Random(derive(options.get("seed", 0), "walk")))
    runs = tuple(
        Run((shift,), start, min(step, samples - start))
        for start, shift in zip(range(0, samples, step), walk, strict=False)
    )
    return Stream("slow", data, runs, **options)


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
            saved=saved,
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


def _walk(names: Sequence[str], severity: int, draw: random.Random) -> Iterator[str]:
    """Yield mixtures from one corruption to another and on, without an end."""
    fading = draw.choice(names)
    while True:
        growing = draw.choice([name for name in names if name != fading])
        for level in range(severity):
            parts = (fading, severity - level), (growing, level)
            yield "+".join(f"{name}:{part}" for name, part in parts if part)
        fading = growing


def _passes(data: Data | Shifted, shifts: Sequence[str]) -> tuple[Run, ...]:
    """Run number k is pass number k over the data of its shift."""
    runs = []
    for number, shift in enumerate(shifts):
        count = len(data) if isinstance(data, Data) else len(data[_known(data, shift)])
        runs.append(Run((shift,), number * count, count))
    return tuple(runs)


def _shifts(data: Data | Shifted, shifts: Sequence[str] | None) -> Sequence[str]:
    if isinstance(shifts, str):
        raise TypeError(f"Give a list of shifts, found '{shifts}'; write ['{shifts}'].")
    if shifts is not None:
        return shifts
    if isinstance(data, Data):
        raise TypeError("Say which shifts: a list such as ['fog:5', 'snow:5'].")
    return list(data)


def _known(data: Shifted, *shifts: str) -> str:
    for shift in shifts:
        if shift not in data:
            raise ValueError(
                f"There are no data for the shift '{shift}' (there are for: {', '.join(data)})."
                f"{suggest(shift, data)}"
            )
    return shifts[0]


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
