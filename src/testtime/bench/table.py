"""Rows as a table on the terminal: a line for each model and method, a column for each shift."""

from collections.abc import Sequence

from rich.table import Table

from testtime.bench.run import Row


def table(rows: Sequence[Row]) -> Table:
    """Return the errors in percent; the lowest of each model and shift is marked."""
    shifts = list(dict.fromkeys(_shift(row) for row in rows))
    data, images = rows[0].data, rows[0].images
    out = Table(
        title=f"Error in %: {images:,} images, batches of {rows[0].batch_size}",
        caption=f"{data}. Each column starts from the source model; a model's lowest in bold.",
    )
    out.add_column("model")
    out.add_column("method")
    for shift in [*shifts, "mean"]:
        out.add_column(shift, justify="right")
    out.add_column("s", justify="right")
    errors: dict[tuple[str, str], dict[str, float]] = {}
    seconds: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row.model, row.method)
        errors.setdefault(key, {})[_shift(row)] = 100 * row.error
        seconds[key] = seconds.get(key, 0.0) + row.seconds
    for line in errors.values():
        line["mean"] = sum(line.values()) / len(line)
    previous = None
    for (model, method), line in errors.items():
        if previous not in (None, model):
            out.add_section()
        cells = []
        for column in [*shifts, "mean"]:
            best = min(other[column] for (m, _), other in errors.items() if m == model)
            text = f"{line[column]:.2f}"
            cells.append(f"[bold]{text}[/bold]" if line[column] == best else text)
        out.add_row(
            "" if model == previous else model, method, *cells, f"{seconds[model, method]:.1f}"
        )
        previous = model
    return out


def _shift(row: Row) -> str:
    return f"{row.shift} {row.severity}".replace("_", " ") if row.severity else row.shift
