"""Published tables, to be run on data that the user has: what was reported, and how it was made.

Numbers are errors in percent, means over the 15 standard corruptions at severity 5.
"""

from dataclasses import dataclass

from testtime._suggest import suggest
from testtime.bench.spec import Spec, grid
from testtime.shifts.corruptions import STANDARD


@dataclass(frozen=True)
class Table:
    """A published table.

    Args:
        data: the kind of data, as ``load_data`` spells it.
        model: whose numbers these are, in words; the user's has to be that to come close.
        protocol: of the bench.
        order: of the samples.
        batch_size: samples a batch.
        errors: of each method, in percent.
        source: where the numbers stand.
        differs: what this protocol cannot be as it was.
        needs_source: whether a method wants clean data.
    """

    data: str
    model: str
    protocol: str
    order: str
    batch_size: int
    errors: dict[str, float]
    source: str
    differs: str = ""
    needs_source: bool = False


TABLES: dict[str, Table] = {
    "tent-cifar10-c": Table(
        "cifar10-c",
        "WRN-28-10, RobustBench's Standard",
        "online",
        "natural",
        200,
        {"source": 43.5, "bn": 20.4, "tent:official": 18.6},
        "repository of TENT (arXiv 2006.10726)",
    ),
    "cotta-cifar10-c": Table(
        "cifar10-c",
        "WRN-28-10, RobustBench's Standard",
        "continual",
        "natural",
        200,
        {"source": 43.5, "bn": 20.4, "tent:official": 20.7, "cotta:official": 16.2},
        "CoTTA (arXiv 2203.13591)",
    ),
    "cotta-imagenet-c": Table(
        "imagenet-c",
        "ResNet-50",
        "continual",
        "shuffled",
        64,
        {
            "source": 82.4,
            "bn": 72.1,
            "tent:official:imagenet:nesterov=True": 66.5,
            "cotta:official:imagenet:symmetric": 63.0,
        },
        "CoTTA (arXiv 2203.13591)",
        "published: 5,000 images a corruption, mean of ten orders of corruptions; here one order",
    ),
    "eata-imagenet-c": Table(
        "imagenet-c",
        "ResNet-50",
        "online",
        "shuffled",
        64,
        {
            "source": 82.0,
            "bn": 66.5,
            "tent:official:imagenet": 57.4,
            "eta:official": 51.9,
            "eata:official": 52.2,
        },
        "repository of EATA (arXiv 2204.02610)",
        needs_source=True,
    ),
    "sar-imagenet-c": Table(
        "imagenet-c",
        "ResNet-50 with GroupNorm, timm:resnet50_gn",
        "online",
        "class",
        64,
        {"source": 69.4, "tent:sar": 78.0, "sar:official": 62.8},
        "SAR (arXiv 2302.12400), online label shifts, imbalance ratio infinite",
    ),
}


def table(name: str) -> Table:
    """Return a published table by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TABLES:
        raise ValueError(
            f"There is no table '{name}' (known: {', '.join(TABLES)}).{suggest(name, TABLES)}"
        )
    return TABLES[name]


def specs(
    published: Table, model: str, data: str, images: int | None, source: str, device: str
) -> list[Spec]:
    """Return the rows of a table, severity 5, seed 0."""
    return grid(
        [model],
        data,
        published.errors,
        [f"{name}:5" for name in STANDARD],
        [published.protocol],
        [published.batch_size],
        order=published.order,
        images=images,
        source=source,
        device=device,
    )
