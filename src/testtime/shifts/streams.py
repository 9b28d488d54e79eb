"""The protocols of the field as streams.

Correlated labels are an order of the samples under any of them: ``order="class"`` for one class
after the other, ``order="dirichlet:0.1"`` for labels that come in clusters.
"""

import random
from collections.abc import Iterator, Sequence
from typing import TypedDict, Unpack

from testtime.shifts.data import Data
from testtime.shifts.seeds import derive
from testtime.shifts.shift import CLEAN
from testtime.shifts.stream import Run, Shifted, Stream, data_of

__all__ = ["Stream", "continual", "gradual", "mixed", "natural", "repeating", "single", "slow"]


class InOrder(TypedDict, total=False):
    """What every builder takes besides its own arguments: see ``Stream``."""

    batch_size: int
    seed: int
    device: str


class Options(InOrder, total=False):
    """What all builders but ``natural`` take besides."""

    order: str


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
    stamps = data_of(data, shift).timestamps
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

    >>> names = ["fog:5", "snow:5"]
    >>> read = {name: read_cifar_c("CIFAR-10-C", name) for name in names}  # doctest: +SKIP
    >>> stream = continual(read)  # doctest: +SKIP

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
    rounds = len(chosen) if passes is None else passes
    total = len(data_of(data, chosen[0])) * rounds if chosen else 0
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
        count = len(data_of(data, shift))
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
