"""Run methods over shifted data and show what each does."""

import shlex
import sys
from pathlib import Path

import click


@click.command()
@click.option("--model", required=True, help="NETWORK:FILE.safetensors or package.module:factory.")
@click.option("--data", required=True, help="digits, or cifar10:FILE.parquet.")
@click.option("--methods", default="source,bn,tent", show_default=True, help="With commas between.")
@click.option("--shifts", default="clean", show_default=True, help="clean, fog:5, ... with commas.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("bench.jsonl"),
    show_default=True,
    help="Append the rows here, a JSON object a line.",
)
def command(
    model: str, data: str, methods: str, shifts: str, batch_size: int, seed: int, out: Path
) -> None:
    """Run methods over shifted data and show what each does.

    A table of errors in percent, and a row of JSON for every method and shift.
    """
    from testtime.adaptation.methods import find
    from testtime.bench import load_data
    from testtime.bench.ledger import append, check_writable
    from testtime.bench.run import parse_shift
    from testtime.cli._show import show
    from testtime.models.load import load_model

    wanted = [method.strip() for method in methods.split(",")]
    shifted = [shift.strip() for shift in shifts.split(",")]
    try:
        for method in wanted:
            find(method)
        for shift in shifted:
            parse_shift(shift)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    check_writable(out)
    models, images = {model.partition(":")[0]: load_model(model)}, load_data(data)
    call = shlex.join(["testtime", *sys.argv[1:]])
    for row in show(models, images, wanted, shifted, batch_size, seed):
        append(out, {**row.json(), "command": call})
    click.echo(f"The rows are in {out}.")
