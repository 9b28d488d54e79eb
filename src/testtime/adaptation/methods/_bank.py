"""RoTTA's bank: images balanced over predicted classes; which go in is decided on indices."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from testtime.adaptation.optim import Tensors


class Item(NamedTuple):
    """What is known of an image without looking at it.

    Args:
        label: the class that was predicted when it came.
        arrival: its number among all images since the start.
        uncertainty: the entropy of that prediction.
        place: where the image is, in the bank as it was and the batch after it.
    """

    label: int
    arrival: int
    uncertainty: float
    place: int


@dataclass
class Bank:
    """The bookkeeping, on the host, while a batch goes in.

    Args:
        capacity: ``N`` images, ``N / C`` of each class.
        classes: ``C``.
        timeliness: weight of the age in the score.
        uncertainty: weight of the entropy in the score.
        items: class by class, in order of arrival.
        seen: how many images came since the start.
    """

    capacity: int
    classes: int
    timeliness: float
    uncertainty: float
    items: list[Item]
    seen: int

    def add(self, label: int, uncertainty: float, place: int) -> None:
        """Take an image in, in the place of a worse one if there is no room, or let it pass."""
        item = Item(label, self.seen, uncertainty, place)
        rivals = [held for held in self.items if held.label == label]
        room = len(rivals) < self.capacity / self.classes
        if room and len(self.items) == self.capacity:
            sizes = Counter(held.label for held in self.items)
            rivals = [held for held in self.items if sizes[held.label] == max(sizes.values())]
        elif room:
            rivals = []
        # Among equals the last; with room and nothing in its way, nobody has to go.
        worst = max(rivals, key=lambda held: (self._score(held), held), default=None)
        if worst is None or self._score(worst) > self._score(item):
            kept = [held for held in self.items if held is not worst]
            self.items = sorted([*kept, item])
        self.seen += 1

    def _score(self, item: Item) -> float:
        """Return how ready an image is to go: old ones, and those that were not sure."""
        age = (self.seen - item.arrival) / self.capacity
        timeliness = self.timeliness / (1 + math.exp(-age))
        return timeliness + self.uncertainty * item.uncertainty / math.log(self.classes)

    def ages(self) -> list[int]:
        """Return how many images came since each one, itself among them."""
        return [self.seen - item.arrival for item in self.items]

    def gather(self, everything: Tensor) -> Tensor:
        """Return the images ``[n, ...]`` of the items, out of the old bank and the batch."""
        return everything[torch.tensor([item.place for item in self.items]).to(everything.device)]

    def tensors(self, everything: Tensor, like: Tensors) -> Tensors:
        """Return it as tensors of its capacity, as :func:`empty` has them."""
        images = self.gather(everything)
        free = self.capacity - len(images)
        blank = images.new_zeros((free, *images.shape[1:]))
        columns: dict[str, Sequence[float]] = {
            "label": [item.label for item in self.items] + [-1] * free,
            "arrival": [item.arrival for item in self.items] + [-1] * free,
            "uncertainty": [item.uncertainty for item in self.items] + [-1] * free,
            "seen": [self.seen],
        }
        return {"images": torch.cat([images, blank])} | {
            k: torch.tensor(column, dtype=like[k].dtype).to(images.device)
            for k, column in columns.items()
        }


def empty(x: Tensor, capacity: int) -> Tensors:
    """Return an empty bank for images like ``x``: where ``arrival`` is -1 there is none."""
    none = x.new_full((capacity,), -1, dtype=torch.int64)
    return {
        "images": x.new_zeros((capacity, *x.shape[1:])),
        "label": none,
        "arrival": none,
        "uncertainty": none.to(torch.promote_types(x.dtype, torch.float32)),
        "seen": none.new_zeros(1),
    }


def look(
    bank: Tensors, labels: Tensor, uncertainties: Tensor
) -> tuple[list[Item], int, list[tuple[int, float]]]:
    """Return the items of a bank, how many images came, and a batch's labels and uncertainties.

    One look from the host for all of it.
    """
    parts = [bank[k] for k in ("label", "arrival", "uncertainty", "seen")] + [labels, uncertainties]
    values = torch.cat([part.double() for part in parts]).cpu()
    label, arrival, entropy, seen, new, unsure = (
        part.tolist() for part in torch.split(values, [len(part) for part in parts])
    )
    rows = enumerate(zip(label, arrival, entropy, strict=True))
    items = [Item(int(a), int(b), c, place) for place, (a, b, c) in rows if b >= 0]
    return items, int(seen[0]), [(int(a), b) for a, b in zip(new, unsure, strict=True)]
