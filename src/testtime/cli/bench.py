"""Run methods over shifted data and show what each does.

A row of JSON for every method and shift, and a table of errors.
"""

import json
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
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Append JSON lines here.")
def command(
    model: str,
    data: str,
    methods: str,
    shifts: str,
    batch_size: int,
    seed: int,
    out: Path | None,
) -> None:
    """Run methods over shifted data and show what each does."""
    from testtime.bench import load_data
    from testtime.cli._show import show
    from testtime.models.load import load_model

    network, images = load_model(model), load_data(data)
    call = shlex.join(["testtime", *sys.argv[1:]])
    wanted, chosen = shifts.split(","), methods.split(",")
    with out.open("a") if out else open("/dev/null", "w") as file:  # noqa: SIM115, PTH123
        for row in show({model.partition(":")[0]: network}, images, chosen, wanted, batch_size, seed):
            print(json.dumps({**row.json(), "command": call}), file=file, flush=True)
