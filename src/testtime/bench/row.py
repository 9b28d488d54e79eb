"""One row of results: a pure function of its specification, a model and data."""

import functools
import hashlib
import platform
import statistics
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import testtime
from testtime.adaptation.adapted import Adapted, adapt
from testtime.adaptation.preprocessing import declared
from testtime.bench import metrics
from testtime.bench.data import Released
from testtime.bench.ledger import Row, digest
from testtime.bench.memory import Peak
from testtime.bench.spec import Spec, parse_method
from testtime.shifts.corruptions import Corruption
from testtime.shifts.data import Data
from testtime.shifts.shift import CLEAN, parse_corruptions, shifted
from testtime.shifts.streams import Stream

CLEAN_IMAGES = 1000  # on which forgetting is measured
SOURCE_IMAGES = 2000  # that methods see of source data, as EATA does
SOURCE_BATCH = 64
HELD_BYTES = 2 * 2**30  # of shifted data that are kept for the next row

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Model:
    """A trained model, and what a row says about it.

    Args:
        name: what it is called.
        module: takes images in [0, 1], or what the data hold.
    """

    name: str
    module: nn.Module

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """The name, the hash of all weights, and the preprocessing that the model carries."""
        hashed = hashlib.sha256()
        for name, tensor in self.module.state_dict().items():
            hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            hashed.update(bytes(flat.view(torch.uint8).untyped_storage()))
        own = next((found for m in self.module.modules() if (found := declared(m))), None)
        return {
            "name": self.name,
            "sha256": hashed.hexdigest(),
            "preprocessing": str(own) if own else "not declared: data go in as they are",
        }


@dataclass(frozen=True, eq=False)
class Answers:
    """What came out over a stream, sample by sample.

    Args:
        logits: ``[N, C]``, float32, on the CPU.
        source_wrong: ``[N]``, was the source's answer to the same samples wrong?
        labels: ``[N]``.
        shifts: of each sample.
    """

    logits: Tensor
    source_wrong: Tensor
    labels: Tensor
    shifts: tuple[str, ...]

    @property
    def wrong(self) -> Tensor:
        """Is the answer wrong? ``[N]``."""
        return self.logits.argmax(1) != self.labels

    def judge(self, mask: Tensor) -> dict[str, Any]:
        """Return the measures over some samples, ``mask`` ``[N]``."""
        logits, labels = self.logits[mask], self.labels[mask]
        wrong, theirs = self.wrong[mask].double(), self.source_wrong[mask].double()
        finite = logits.isfinite().all(1)
        sound = logits.nan_to_num()  # measures that need numbers still count such a row
        return {
            "images": len(labels),
            "error": float(wrong.mean()),
            "error_interval": list(metrics.interval(wrong)),
            "source_error": float(theirs.mean()),
            "gain_interval": list(metrics.interval(theirs - wrong)),
            "nll": metrics.nll(sound, labels),
            "ece": metrics.ece(sound, labels),
            "brier": metrics.brier(sound, labels),
            "top_class": metrics.top_share(logits.argmax(1)),
            "histogram_entropy": metrics.histogram_entropy(logits.argmax(1)),
            "label_entropy": metrics.histogram_entropy(labels),
            "not_finite": int((~finite).sum()),
        }


def key(spec: Spec, model: Model, data: Data | Released) -> str:
    """Return what tells a row apart: what was asked for, of which model and which data."""
    return digest([spec.json(), model.fingerprint, fingerprint(data, spec)])


def fingerprint(data: Data | Released, spec: Spec) -> dict[str, Any]:
    """Say which samples a row is of; of a released benchmark, under all its shifts."""
    if isinstance(data, Data):
        return some(data, spec.images).fingerprint()
    parts = [some(data.at(shift), spec.images).fingerprint() for shift in spec.shifts]
    return {
        **parts[0],
        "name": data.name,
        "sha256": digest(parts),
        "sha256_of": "fingerprints of all shifts",
    }


def measure(
    spec: Spec,
    model: Model,
    data: Data | Released,
    source: Data | None = None,
    progress: Progress = lambda images, wrong: None,
) -> Row:
    """Run one row; an error of the method or the model becomes a row that says so.

    Args:
        spec: what to run.
        model: what adapts; it is not changed, but goes to the device.
        data: what the stream is of.
        source: clean data for methods that need them.
        progress: called after each batch with its images, and how many answers were wrong.
    """
    method = parse_method(spec.method)
    row: Row = {
        "key": key(spec, model, data),
        "spec": spec.json(),
        "model": model.fingerprint,
        "data": fingerprint(data, spec),
        "method": {"name": method.name, "configuration": method.configuration()},
        "versions": versions(),
    }
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what is said goes into the row
            outcome, measured = _run(spec, model, data, source, progress)
        row |= {"status": "done", **outcome}
    except Exception as error:
        row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        measured = {}
    row["measured"] = {
        **measured,
        "total_seconds": round(time.perf_counter() - started, 3),
        "host": platform.node(),
        "device": _device_name(spec.device),
        "threads": torch.get_num_threads(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return row


def _run(
    spec: Spec, model: Model, data: Data | Released, source: Data | None, progress: Progress
) -> tuple[Row, Row]:
    method = parse_method(spec.method)
    adapted = adapt(
        model.module.to(spec.device),
        method,
        seed=spec.seed,
        window=spec.window,
        source=_batches(source, spec.device) if source is not None else None,
    )
    parts = {shift: _held(data, shift, spec) for shift in spec.shifts}
    stream = spec.stream(parts)
    clock: list[tuple[float, int]] = []
    with Peak(spec.device) as peak:
        answers = _answer(adapted, stream, clock, progress)
    report = adapted.report()
    every = torch.ones(len(answers.labels), dtype=torch.bool)
    masks = {s: torch.tensor([s == of for of in answers.shifts]) for s in stream.shifts}
    by_shift = {shift: answers.judge(mask) for shift, mask in masks.items()}
    worst = max(by_shift, key=lambda shift: float(by_shift[shift]["error"]))
    outcome: Row = {
        "stream": {k: v for k, v in stream.describe().items() if k != "data"},
        "results": {
            **answers.judge(every),
            "clean_error_after": _clean_error(adapted, data, spec),
            "worst_shift": worst,
            "worst_error": by_shift[worst]["error"],
            "error_by_class": _named(metrics.error_by(answers.wrong, answers.labels)),
            "error_over_stream": metrics.over_stream(answers.wrong),
        },
        "shifts": by_shift,
        "made": {} if isinstance(data, Released) else {s: _made(data, s) for s in spec.shifts},
        "adapts": {"tensors": len(report.adapts), "share": report.share},
        "skipped": report.skipped,
        "forwards": round(report.forwards / len(every), 4),
        "backwards": round(report.backwards / len(every), 4),
        "said": list(report.said),
    }
    groups = next(iter(parts.values())).groups
    if groups is not None:
        groups = groups[torch.cat([index for index, _ in stream.plan()])]
        outcome["results"]["error_by_group"] = _named(metrics.error_by(answers.wrong, groups))
    each = sorted(seconds / images for seconds, images in clock)
    return outcome, {
        "seconds": round(sum(seconds for seconds, _ in clock), 4),
        "seconds_per_image": {
            "median": statistics.median(each),
            "p95": each[min(int(0.95 * len(each)), len(each) - 1)],
        },
        "peak_mib": peak.mib,
    }


def _made(data: Data, shift: str) -> list[dict[str, Any]]:
    """Say how the images of a shift are made: tables, constants, textures of frost."""
    parts = parse_corruptions(shift)
    if not parts:
        return []
    height, width = data.samples[[0]].shape[-2:]
    last = len(parts) - 1
    return [
        Corruption(name, severity, cut=k == last).record(height, width)
        for k, (name, severity) in enumerate(parts)
    ]


def _answer(
    adapted: Adapted, stream: Stream, clock: list[tuple[float, int]], progress: Progress
) -> Answers:
    """Run the stream, labels apart; the source's answers are taken beside, off the clock."""
    logits, theirs, labels = [], [], []
    shifts: list[str] = []
    for batch in stream:
        started = time.perf_counter()
        found = adapted.learner.logits_of(adapted(batch.images)).float().cpu()
        clock.append((time.perf_counter() - started, len(batch)))
        source = adapted.learner.logits_of(adapted.source(batch.images)).cpu()
        if found.dim() != 2 or int(batch.labels.max()) >= found.shape[1]:
            raise ValueError(
                f"The model answers {list(found.shape)}, but the labels go up to "
                f"{int(batch.labels.max())}. Give data with the classes of the model."
            )
        logits.append(found)
        theirs.append(source.argmax(1) != batch.labels)
        labels.append(batch.labels)
        shifts += batch.shifts
        progress(len(batch), int((found.argmax(1) != batch.labels).sum()))
    return Answers(torch.cat(logits), torch.cat(theirs), torch.cat(labels), tuple(shifts))


def _clean_error(adapted: Adapted, data: Data | Released, spec: Spec) -> float | None:
    """Return the error on the first clean samples as adapted at the end: what was forgotten."""
    if set(spec.shifts) == {CLEAN} or isinstance(data, Released):
        return None
    few = some(data, CLEAN_IMAGES)
    wrong = 0
    for start in range(0, len(few), spec.batch_size):
        index = list(range(start, min(start + spec.batch_size, len(few))))
        output = adapted.predict(few.samples[index].to(spec.device))
        predicted = adapted.learner.logits_of(output).argmax(1).cpu()
        wrong += int((predicted != few.labels[index]).sum())
    return wrong / len(few)


def some(data: Data, images: int | None) -> Data:
    """Return the first so many samples, or all where there are no more."""
    return data if images is None or images >= len(data) else data.take(range(images))


def _batches(source: Data, device: str) -> list[Tensor]:
    few = some(source, SOURCE_IMAGES)
    return [part.to(device) for part in torch.split(few.images, SOURCE_BATCH)]


_shelf: OrderedDict[str, Data] = OrderedDict()


def _held(data: Data | Released, shift: str, spec: Spec) -> Data:
    """Return the data under a shift, kept in memory for the next row as far as there is room."""
    whole = data.at(shift) if isinstance(data, Released) else data
    few = some(whole, spec.images)
    name = digest([few.fingerprint(), shift, spec.seed, spec.device])
    if name not in _shelf:
        kind = CLEAN if isinstance(data, Released) else shift
        _shelf[name] = shifted(few, kind, seed=spec.seed, device=spec.device).load()
        while len(_shelf) > 1 and sum(d.images.nbytes for d in _shelf.values()) > HELD_BYTES:
            _shelf.popitem(last=False)
    _shelf.move_to_end(name)
    return _shelf[name]


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions a row hangs on; ``code`` is the hash of this package's source."""
    root = Path(testtime.__file__).parent
    hashed = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        hashed.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return {
        "testtime": testtime.__version__,
        "code": hashed.hexdigest()[:16],
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def _device_name(device: str) -> str:
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(torch.device(device))
    return platform.processor() or platform.machine()


def _named(values: dict[int, float]) -> dict[str, float]:
    return {str(k): v for k, v in values.items()}  # a JSON object's keys are strings
