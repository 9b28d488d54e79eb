"""The order of samples in one pass over a data set, from its labels and a seed."""

import random

import torch
from torch import Tensor

from testtime._suggest import suggest
from testtime.shifts.seeds import derive, generator

ORDERS = ("natural", "shuffled", "class", "dirichlet")


def parse_order(order: str) -> tuple[str, float]:
    """Return the name of an order and its concentration (0 where it has none).

    Raises:
        ValueError: there is no such order, or its concentration is no positive number.
    """
    name, colon, concentration = order.partition(":")
    if name not in ORDERS or (name == "dirichlet") != bool(colon):
        raise ValueError(
            f"There is no order '{order}' (known: natural, shuffled, class, dirichlet:0.1)."
            f"{suggest(name, ORDERS)}"
        )
    try:
        value = float(concentration or 0)
    except ValueError:
        value = -1
    if name == "dirichlet" and not 0 < value < float("inf"):
        raise ValueError(
            f"The order '{order}' needs a concentration above 0. Write it as dirichlet:0.1."
        )
    return name, value


def arrange(order: str, labels: Tensor, seed: int) -> Tensor:
    """Return the indices of all samples in an order, int64 ``[N]``.

    The last two orders look at all labels of the pass, as they do in the papers; none looks at a
    sample.

    Args:
        order: ``natural`` (as the data are stored), ``shuffled``, ``class`` (one class after the
            other, in a random sequence of classes), or ``dirichlet:0.1`` (labels correlated in
            time; the smaller the concentration, the more).
        labels: ``[N]``.
        seed: of all draws.
    """
    name, concentration = parse_order(order)
    if name == "natural":
        return torch.arange(len(labels))
    shuffled = torch.randperm(len(labels), generator=generator(seed))
    if name == "shuffled":
        return shuffled
    found = torch.unique(labels)
    classes = [
        shuffled[labels[shuffled] == found[i]]
        for i in torch.randperm(len(found), generator=generator(derive(seed, "classes")))
    ]
    return torch.cat(classes) if name == "class" else dirichlet(classes, concentration, seed)


def dirichlet(classes: list[Tensor], concentration: float, seed: int) -> Tensor:
    """Spread each class over as many slots as there are classes, in shares of a Dirichlet draw.

    Inside a slot the classes follow one another in a random sequence.

    Source: Yuan et al., "Robust test-time adaptation in dynamic scenarios", CVPR 2023, after Gong
    et al., "NOTE: robust continual test-time adaptation against temporal correlation", NeurIPS
    2022. RoTTA takes at most 100 slots, and leaves the samples of a class in their order.
    """
    # Python's own generator: torch has no Dirichlet draw that takes one.
    draw = random.Random(seed)
    slots: list[list[Tensor]] = [[] for _ in range(min(len(classes), 100))]
    for members in classes:
        gammas = [draw.gammavariate(concentration, 1) for _ in slots]
        if not any(gammas):
            # Draws far below a concentration of 0.01 round to zero; in the limit one slot gets all.
            gammas[draw.randrange(len(slots))] = 1.0
        ends, share = [], 0.0
        for gamma in gammas:
            share += gamma / sum(gammas)
            ends.append(int(share * len(members)))
        ends[-1] = len(members)
        for slot, start, end in zip(slots, [0, *ends], ends, strict=False):
            slot.append(members[start:end])
    for slot in slots:
        draw.shuffle(slot)
    return torch.cat([part for slot in slots for part in slot])
