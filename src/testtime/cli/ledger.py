"""Show, filter, merge, check and export ledgers."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from testtime.cli._options import COMMAS


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--where", multiple=True, metavar="FIELD=VALUE", help="Only rows that have it.")
@click.option(
    "--columns",
    type=COMMAS,
    default="spec.method,model.name,spec.shifts,spec.protocol,spec.batch_size,spec.seed,"
    "results.error,results.source_error,status",
    help="Fields to show, by dotted path.",
)
@click.option("--check", is_flag=True, help="Say what makes rows doubtful; exit code 1 if any.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Write CSV here.")
@click.option("--parquet", type=click.Path(path_type=Path), help="Write parquet here.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the rows to a new ledger.")
def command(
    files: tuple[Path, ...],
    where: tuple[str, ...],
    columns: list[str],
    check: bool,
    csv_file: Path | None,
    parquet: Path | None,
    out: Path | None,
) -> None:
    """Show, filter, merge, check and export ledgers.

    Several files are merged; rows that were asked for alike must have come out alike. A field is a
    dotted path, such as spec.method=tent or model.name=resnet20.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from testtime.bench.ledger import Ledger, flat, write

    first, *rest = (Ledger.read(file) for file in files)
    doubts = [
        f"{file}: {doubt}"
        for file, ledger in zip(files, (first, *rest), strict=True)
        for doubt in ledger.check()
    ]
    ledger = first.merge(*rest) if rest else first
    for condition in where:
        path, equals, value = condition.partition("=")
        known = {key for row in ledger for key in flat(row)}
        if not equals or path not in known:
            raise click.UsageError(
                f"--where {condition}: write FIELD=VALUE with one of {', '.join(sorted(known))}."
            )
        ledger = ledger.filter(partial(_has, path=path, value=value))
    if csv_file:
        csv_file.write_text(ledger.csv())
    if parquet:
        ledger.parquet(parquet)
    if out:
        write(ledger.rows, out)
    if not (csv_file or parquet or out):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column.rpartition(".")[2], overflow="fold")
        for row in ledger:
            values = flat(row)
            table.add_row(*(_shown(values.get(column)) for column in columns))
        Console().print(table)
        click.echo(f"{len(ledger)} rows.")
    for doubt in doubts:
        click.echo(doubt, err=True)
    if check and doubts:
        raise SystemExit(1)


def _has(row: dict[str, Any], path: str, value: str) -> bool:
    from testtime.bench.ledger import flat

    return str(flat(row).get(path)) == value


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)
