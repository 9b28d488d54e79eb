"""Run methods over shifted data and show what each does."""

import shlex
import sys
from pathlib import Path
from typing import Literal

import click

from testtime.cli._options import COMMAS, NUMBERS


@click.command()
@click.option("--model", "models", required=True, multiple=True, help="See below; several may be.")
@click.option("--data", required=True, help="See below.")
@click.option("--methods", default="source,bn,tent", show_default=True, type=COMMAS)
@click.option(
    "--shifts",
    default="clean",
    show_default=True,
    type=COMMAS,
    help="clean, fog:5, fog:3+snow:2, standard:5, all:5.",
)
@click.option(
    "--protocol",
    "protocols",
    default="online",
    show_default=True,
    type=COMMAS,
    help="online (each shift from the source model), continual, mixed, repeating.",
)
@click.option("--batch-size", "batch_sizes", default="64", show_default=True, type=NUMBERS)
@click.option("--seeds", default="0", show_default=True, type=NUMBERS)
@click.option("--images", type=click.IntRange(1), help="So many, from the first; default all.")
@click.option(
    "--order",
    default="natural",
    show_default=True,
    help="natural, shuffled, class, dirichlet:0.1.",
)
@click.option("--window", default=0, show_default=True, help="Gather single images; batch size 1.")
@click.option("--source", help="Clean data for methods that need them, as --data.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--engine", default="local", show_default=True, type=click.Choice(["local", "ray"]))
@click.option("--allow", multiple=True, type=click.Choice(["preprocessing"]))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("bench.jsonl"),
    show_default=True,
    help="The ledger: rows are appended, and those that it holds are not run again.",
)
def command(
    models: tuple[str, ...],
    data: str,
    methods: list[str],
    shifts: list[str],
    protocols: list[str],
    batch_sizes: list[int],
    seeds: list[int],
    images: int | None,
    order: str,
    window: int,
    source: str | None,
    device: str,
    engine: Literal["local", "ray"],
    allow: tuple[str, ...],
    out: Path,
) -> None:
    """Run methods over shifted data and show what each does.

    Every method on every model under every shift is a row of the ledger --out. Killed and started
    again, it goes on where it was. A method takes presets and settings after colons:
    tent:imagenet:lr=1e-4.

    \b
    Models: NETWORK:FILE.safetensors (resnet20, resnet56, resnet26gn), timm:NAME[:FILE],
    torchvision:NAME[:FILE], hf:NAME_OR_PATH, package.module:factory.
    Data: digits, cifar10:FILE.parquet and others; a wrong name lists them.
    """
    from testtime.bench import grid
    from testtime.bench.run import read, read_source
    from testtime.cli._show import show
    from testtime.models.load import short_name

    fixed = {"images": images, "order": order, "window": window, "device": device}
    try:
        # Looked through before anything is loaded; the data's name is not known yet.
        grid(models, "", methods, shifts, protocols, batch_sizes, seeds, **fixed)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    held = read(data)
    clean = None if source is None else read_source(source)
    named = {short_name(model): model for model in models}
    specs = grid(
        named,
        held.name,
        methods,
        shifts,
        protocols,
        batch_sizes,
        seeds,
        source="" if clean is None else clean.name,
        **fixed,
    )
    call = shlex.join(["testtime", *sys.argv[1:]])
    show(named, held, clean, specs, out=out, engine=engine, allow=allow, command=call)
    click.echo(f"The rows are in {out}. See them with: testtime report {out}")
