"""The names of shifts: ``clean``, ``fog:5``, and ``fog:3+snow:2`` for one upon the other."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from testtime._suggest import suggest
from testtime.shifts.corruptions import CONSTANTS, Table, corrupt
from testtime.shifts.data import Data, Samples
from testtime.shifts.seeds import derive

CLEAN = "clean"


def parse_shift(shift: str) -> tuple[str, int]:
    """Return name and severity of a shift such as ``fog:5``, whoever made it.

    Raises:
        ValueError: it has no severity from 1 to 5.
    """
    name, _, severity = shift.partition(":")
    if not name or name == CLEAN or severity not in ("1", "2", "3", "4", "5"):
        raise ValueError(
            f"The shift '{shift}' has no severity from 1 to 5. Write it as fog:5, or clean."
        )
    return name, int(severity)


def parse_corruptions(shift: str) -> tuple[tuple[str, int], ...]:
    """Return the corruptions of a shift in the order of their application; none for ``clean``.

    Raises:
        ValueError: there is no such corruption, or no such severity.
    """
    if shift == CLEAN:
        return ()
    corruptions = tuple(parse_shift(part) for part in shift.split("+"))
    for name, _ in corruptions:
        if name not in CONSTANTS:
            raise ValueError(
                f"There is no corruption '{name}' (known: {', '.join(CONSTANTS)})."
                f"{suggest(name, CONSTANTS)}"
            )
    return corruptions


def shifted(
    data: Data, shift: str, *, seed: int = 0, device: str = "cpu", table: Table | None = None
) -> Data:
    """Give the data under a shift; images are corrupted when they are asked for.

    >>> from testtime import demo
    >>> digits = Data("digits", *demo.digits("test"), sha256=demo.sha256())
    >>> foggy = shifted(digits, "fog:5")
    >>> image, label = foggy[0]

    The draws of an image depend on the seed, its index in the data, the corruption and its
    severity, and on nothing else: not on its batch, nor on what was asked for before. So images go
    through ``corrupt`` one by one. ``.load()`` keeps the outcome for many readings.

    Args:
        data: images ``[N, 3, H, W]``.
        shift: ``clean``, ``fog:5``, or ``fog:3+snow:2`` for fog and then snow.
        seed: of the draws.
        device: where the images are corrupted and stay. Draws differ by kind of device.
        table: as in ``corrupt``.

    Raises:
        ValueError: there is no such corruption, or no such severity.
    """
    corruptions = parse_corruptions(shift)
    if not corruptions and device == "cpu":
        return data
    name = f"{data.name}, {shift}" if corruptions else data.name
    return replace(
        data, name=name, samples=_Shifted(data.samples, corruptions, seed, device, table)
    )


@dataclass(frozen=True, eq=False)
class _Shifted:
    samples: Tensor | Samples
    corruptions: tuple[tuple[str, int], ...]
    seed: int
    device: str
    table: Table | None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: list[int], /) -> Tensor:
        images = self.samples[index].to(self.device)
        generator = torch.Generator(self.device)
        for name, severity in self.corruptions:
            # Generators on the CPU take 32 bits of a seed: counting up keeps images apart.
            first = derive(self.seed, name, severity)
            images = torch.cat(
                [
                    corrupt(
                        image[None],
                        name,
                        severity,
                        generator=generator.manual_seed((first + i) % 2**63),
                        table=self.table,
                    )
                    for i, image in zip(index, images, strict=True)
                ]
            )
        return images
