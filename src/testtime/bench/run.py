"""Run methods over shifted data, a row each."""

import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import testtime
from testtime._suggest import suggest
from testtime.adaptation.adapted import adapt
from testtime.adaptation.methods import find
from testtime.bench.data import Data
from testtime.shifts import CORRUPTIONS, Corruption

CLEAN = "clean"


@dataclass(frozen=True)
class Row:
    """One method on one model under one shift, and what came out.

    Each row starts from the source model (protocol ``online``). ``error`` and the share of the most
    predicted class, ``top_class``, are from 0 to 1; ``seconds`` are wall clock and cover adapting
    and answering alone; forwards and backwards are of images. ``corruption`` says how the images
    were made (``Corruption.record``), frost's textures among it; of clean ones it is empty.
    """

    model: str
    data: str
    data_sha256: str
    images: int
    shift: str
    severity: int
    corruption: dict[str, Any]
    method: str
    configuration: dict[str, str]
    protocol: str
    batch_size: int
    seed: int
    error: float
    top_class: float
    skipped: int
    seconds: float
    forwards: int
    backwards: int
    said: tuple[str, ...]
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]

    def json(self) -> dict[str, object]:
        """Return the row as one object of a JSON line."""
        return asdict(self)


def run(
    model: nn.Module,
    data: Data,
    *,
    name: str,
    methods: Iterable[str],
    shifts: Iterable[str],
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int], None] = lambda images: None,
) -> Iterator[Row]:
    """Yield a row for every method under every shift, as each is done.

    Args:
        model: takes images in [0, 1], ``[B, 3, H, W]``.
        data: what to run on, in its own order.
        name: the model's name in the rows.
        methods: names of methods.
        shifts: ``clean``, or ``NAME:SEVERITY`` of a corruption.
        batch_size: images a batch; the last one may be short.
        seed: of corruptions and methods.
        progress: called with the number of images done.

    Raises:
        ValueError: a shift or method is not known, or a method does not fit the model.
    """
    wanted, chosen = [parse_shift(shift) for shift in shifts], [find(method) for method in methods]
    if len(set(data.labels.tolist())) < 2:
        raise ValueError(
            f"All {len(data.labels)} labels of {data.name} are of one class, so an error says "
            "nothing. Use data with several classes."
        )
    for shift, severity in wanted:
        images = shifted(data.images, shift, severity, seed)
        record = {} if shift == CLEAN else Corruption(shift, severity).record(*images.shape[2:])
        for method in chosen:
            with warnings.catch_warnings():
                # What is said goes into the row.
                warnings.simplefilter("ignore", UserWarning)
                adapted = adapt(model, method, seed=seed)
                started = time.perf_counter()
                answers = []
                for batch in torch.split(images, batch_size):
                    answers.append(adapted(batch).argmax(1))
                    progress(len(batch))
                seconds = time.perf_counter() - started
            predicted = torch.cat(answers)
            report = adapted.report()
            yield Row(
                model=name,
                data=data.name,
                data_sha256=data.sha256,
                images=len(images),
                shift=shift,
                severity=severity,
                corruption=record,
                method=method.name,
                configuration=method.configuration(),
                protocol="online",
                batch_size=batch_size,
                seed=seed,
                error=float((predicted != data.labels).double().mean()),
                top_class=float(predicted.bincount().max()) / len(predicted),
                skipped=report.skipped,
                seconds=round(seconds, 3),
                forwards=report.forwards,
                backwards=report.backwards,
                said=report.said,
                device=str(images.device),
                dtype=str(images.dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                versions={
                    "testtime": testtime.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
            )


def shifted(images: Tensor, shift: str, severity: int, seed: int) -> Tensor:
    """Return the images under a shift, continuous in [0, 1]; the draws depend on the seed alone."""
    if shift == CLEAN:
        return images
    generator = torch.Generator(images.device).manual_seed(seed)
    corruption = Corruption(shift, severity)
    return torch.cat([corruption(part, generator) for part in torch.split(images, 500)])


def parse_shift(shift: str) -> tuple[str, int]:
    """Return name and severity of a shift such as ``fog:5``, or of ``clean``.

    Raises:
        ValueError: there is no such corruption, or no such severity.
    """
    name, _, severity = shift.partition(":")
    if shift == CLEAN:
        return CLEAN, 0
    if name == CLEAN or severity not in ("1", "2", "3", "4", "5"):
        raise ValueError(
            f"The shift '{shift}' has no severity from 1 to 5. Write it as fog:5, or clean."
        )
    if name not in CORRUPTIONS:
        raise ValueError(
            f"There is no corruption '{name}' (known: {', '.join(CORRUPTIONS)})."
            f"{suggest(name, CORRUPTIONS)}"
        )
    return name, int(severity)
