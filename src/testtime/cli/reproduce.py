"""Run a published table on data that you have, and print both numbers."""

import shlex
import sys
from pathlib import Path

import click


@click.command()
@click.argument("name")
@click.option("--model", required=True, help="As in testtime bench: the model of the table.")
@click.option("--data", required=True, help="The folder of CIFAR-10-C or ImageNet-C.")
@click.option("--source", help="Clean data for methods that need them, such as imagenet:FOLDER.")
@click.option("--images", type=click.IntRange(1), help="So many of each corruption; default all.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The ledger; default NAME.jsonl.",
)
def command(
    name: str,
    model: str,
    data: str,
    source: str | None,
    images: int | None,
    device: str,
    out: Path | None,
) -> None:
    """Run a published table on data that you have, and print both numbers.

    NAME is tent-cifar10-c, cotta-cifar10-c, cotta-imagenet-c, eata-imagenet-c or sar-imagenet-c.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from testtime.bench import reproduce
    from testtime.bench.run import read, read_source
    from testtime.bench.summary import compare
    from testtime.cli._show import show

    try:
        published = reproduce.table(name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if published.needs_source and not source:
        raise click.UsageError(f"{name} has a method that needs clean data: give --source.")
    held = read(f"{published.data}:{data}")
    clean = read_source(source) if source else None
    rows = reproduce.specs(published, model, held.name, images, clean.name if clean else "", device)
    call = shlex.join(["testtime", *sys.argv[1:]])
    ledger = show({model: model}, held, clean, rows, out=out or Path(f"{name}.jsonl"), command=call)
    (comparison,) = compare(ledger)
    table = Table(title=f"{name}: error in %, mean over 15 corruptions", box=box.SIMPLE_HEAD)
    for head in ("method", "published", "here", "difference"):
        table.add_column(head, justify="left" if head == "method" else "right")
    here = {line.method: 100 * line.error for line in comparison.done}
    for method, theirs in published.errors.items():
        mine = here.get(method)
        shown = ("failed", "") if mine is None else (f"{mine:.1f}", f"{mine - theirs:+.1f}")
        table.add_row(method, f"{theirs:.1f}", *shown)
    console = Console()
    console.print(table)
    console.print(f"Published: {published.source}; {published.model}.", highlight=False)
    if published.differs:
        console.print(f"What differs: {published.differs}.", highlight=False)
    if images:
        console.print(f"Here: {images} images of each corruption.", highlight=False)
