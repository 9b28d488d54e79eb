"""Rows as a table on the terminal: a line for each model and method, a column for each shift."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from testtime.bench.run import Row

MEAN = "mean"


def table(rows: Sequence[Row]) -> Table:
    """Return the errors in percent; the lowest of each model under each shift is bold."""
    shifts = list(dict.fromkeys(_shift(row) for row in rows))
    errors: dict[tuple[str, str], dict[str, float]] = {}
    seconds: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row.model, row.method)
        errors.setdefault(key, {})[_shift(row)] = 100 * row.error
        seconds[key] = seconds.get(key, 0.0) + row.seconds
    for line in errors.values():
        line[MEAN] = sum(line.values()) / len(line)
    out = Table(
        title=f"Error in %: {rows[0].images:,} images, batches of {rows[0].batch_size}",
        caption=f"{rows[0].data}. Each column starts from the source model.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    out.add_column("model", no_wrap=True)
    out.add_column("method", no_wrap=True)
    for shift in [*shifts, MEAN, "s"]:
        out.add_column(shift.replace(" ", "\n"), justify="right", no_wrap=True)
    previous = ""
    for (model, method), line in errors.items():
        rivals = [other for (m, _), other in errors.items() if m == model]
        cells = [
            _cell(line[shift], min(other[shift] for other in rivals)) for shift in [*shifts, MEAN]
        ]
        if previous and model != previous:
            out.add_section()
        shown = "" if model == previous else model
        out.add_row(shown, method, *cells, f"{seconds[model, method]:.1f}")
        previous = model
    return out


def _cell(error: float, lowest: float) -> str:
    return f"[bold]{error:.2f}[/bold]" if error == lowest else f"{error:.2f}"


def _shift(row: Row) -> str:
    return f"{row.shift} {row.severity}".replace("_", " ") if row.severity else row.shift
