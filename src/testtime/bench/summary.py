"""Rows gathered to what is compared: the methods of one setting, side by side."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from testtime.bench.ledger import Row
from testtime.bench.metrics import seeds_interval
from testtime.shifts.shift import CLEAN

Interval = tuple[float, float]

# A method has collapsed where its answers are spread over classes less than half as far as the
# labels are, in nats.
COLLAPSE = 0.5


@dataclass(frozen=True)
class Setting:
    """What methods share that may be compared.

    Args:
        model: its name.
        data: its name.
        images: samples of the data.
        protocol: ``online``, ``continual``, ...
        order: of the samples.
        batch_size: samples a batch.
        window: of single images; 0 for none.
    """

    model: str
    data: str
    images: int
    protocol: str
    order: str
    batch_size: int
    window: int

    @classmethod
    def of(cls, row: Row) -> "Setting":
        """Return the setting of a row."""
        spec, data = row["spec"], row["data"]
        return cls(
            row["model"]["name"],
            data["name"],
            data["count"],
            spec["protocol"],
            spec["order"],
            spec["batch_size"],
            spec["window"],
        )

    def __str__(self) -> str:
        """Return the setting in words."""
        batches = f"window of {self.window}" if self.window else f"batches of {self.batch_size}"
        order = "" if self.order == "natural" else f", order {self.order}"
        return (
            f"{self.model} on {self.data}, {self.images:,} images, "
            f"{self.protocol}, {batches}{order}"
        )


@dataclass(frozen=True)
class Line:
    """One method in one setting: means over shifts and seeds, errors from 0 to 1.

    Clean images have no part in a mean over shifts.

    An interval over images is the mean of the shifts' intervals, as if what is drawn went the same
    way under every shift, for the images are the same: it is rather too wide. With several seeds it
    is Student's, over the seeds.

    Args:
        method: as asked for, settings included.
        rows: the rows behind it that are done.
        failed: what went wrong in the others.
    """

    method: str
    rows: tuple[Row, ...] = field(repr=False)
    failed: tuple[str, ...] = ()

    def mean(self, what: str) -> float:
        """Return the mean of a measure over all shifts (clean images left out) and seeds."""
        values: list[float] = [part[what] for part in self._parts]
        return sum(values) / len(values)

    @property
    def _parts(self) -> list[dict[str, Any]]:
        """The measures under each shift; clean images count only where there is nothing else."""
        every = [pair for row in self.rows for pair in row["shifts"].items()]
        shifted = [part for shift, part in every if shift != CLEAN]
        return shifted or [part for _, part in every]

    @property
    def error(self) -> float:
        """The mean error."""
        return self.mean("error")

    @property
    def gain(self) -> float:
        """By how much the error is below the source's on the same images."""
        return self.mean("source_error") - self.error

    @property
    def error_interval(self) -> Interval:
        """Where the error lies, at 95 %."""
        return self._interval("error_interval", lambda line: line.error)

    @property
    def gain_interval(self) -> Interval:
        """Where the gain lies, at 95 %; below 0 the source is better."""
        return self._interval("gain_interval", lambda line: line.gain)

    @property
    def by_shift(self) -> dict[str, float]:
        """The error under each shift, the mean over seeds."""
        found: dict[str, list[float]] = {}
        for row in self.rows:
            for shift, part in row["shifts"].items():
                found.setdefault(shift, []).append(part["error"])
        return {shift: sum(errors) / len(errors) for shift, errors in found.items()}

    @property
    def worst(self) -> tuple[str, float]:
        """The shift with the largest error, and that error."""
        return max(self.by_shift.items(), key=lambda pair: pair[1])

    @property
    def forgotten(self) -> float | None:
        """The error on clean images after adapting, the mean; none where nothing was shifted."""
        found = [row["results"]["clean_error_after"] for row in self.rows]
        kept = [error for error in found if error is not None]
        return sum(kept) / len(kept) if kept else None

    @property
    def collapsed(self) -> list[str]:
        """The shifts under which the answers went to few classes."""
        return [
            shift
            for row in self.rows
            for shift, part in row["shifts"].items()
            if part["histogram_entropy"] < COLLAPSE * part["label_entropy"]
        ]

    @property
    def milliseconds(self) -> tuple[float, float]:
        """An image's time, median and 95th percentile, the mean over rows."""
        times = [row["measured"]["seconds_per_image"] for row in self.rows]
        median, late = (1e3 * sum(t[k] for t in times) / len(times) for k in ("median", "p95"))
        return median, late

    @property
    def passes(self) -> tuple[float, float]:
        """Forwards and backwards an image."""
        forwards, backwards = (
            sum(row[k] for row in self.rows) / len(self.rows) for k in ("forwards", "backwards")
        )
        return forwards, backwards

    @property
    def peak_mib(self) -> float | None:
        """The largest peak memory of a row."""
        found = [row["measured"]["peak_mib"] for row in self.rows]
        return max((mib for mib in found if mib is not None), default=None)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that were run."""
        return tuple(dict.fromkeys(row["spec"]["seed"] for row in self.rows))

    def _interval(self, what: str, value: Any) -> Interval:
        of_seed = [
            value(Line(self.method, tuple(r for r in self.rows if r["spec"]["seed"] == seed)))
            for seed in self.seeds
        ]
        over_seeds = seeds_interval(of_seed)
        if over_seeds is not None:
            return over_seeds
        ends = [part[what] for part in self._parts]
        low, high = (sum(end[k] for end in ends) / len(ends) for k in (0, 1))
        return low, high


@dataclass(frozen=True)
class Comparison:
    """The methods of one setting, best first; those of which no row is done come last."""

    setting: Setting
    lines: tuple[Line, ...]

    @property
    def shifts(self) -> list[str]:
        """All shifts, in the order that they were run."""
        return list(dict.fromkeys(shift for line in self.done for shift in line.by_shift))

    @property
    def done(self) -> list[Line]:
        """The methods with rows."""
        return [line for line in self.lines if line.rows]

    @property
    def even(self) -> bool:
        """Whether every method ran under the same shifts, so that means can be compared."""
        return len({frozenset(line.by_shift) for line in self.done}) <= 1


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """Return the comparisons that the rows allow, in the order of the rows."""
    groups: dict[Setting, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(Setting.of(row), {}).setdefault(row["spec"]["method"], []).append(row)
    return [
        Comparison(setting, _ranked([_line(name, found) for name, found in methods.items()]))
        for setting, methods in groups.items()
    ]


def _line(method: str, rows: Sequence[Row]) -> Line:
    failed = [row["error"] for row in rows if row["status"] == "failed"]
    return Line(
        method, tuple(row for row in rows if row["status"] == "done"), tuple(dict.fromkeys(failed))
    )


def _ranked(lines: list[Line]) -> tuple[Line, ...]:
    return tuple(sorted(lines, key=lambda line: (not line.rows, line.error if line.rows else 0)))
