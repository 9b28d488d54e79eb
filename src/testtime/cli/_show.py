"""A progress bar while rows are made, and the table of them; shared by demo and bench."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from testtime.adaptation.adapted import adapt
from testtime.bench import Data, Row, run
from testtime.bench.table import table


def show(
    models: Mapping[str, nn.Module],
    data: Data,
    methods: Sequence[str],
    shifts: Sequence[str],
    batch_size: int,
    seed: int,
) -> Iterator[Row]:
    """Yield every row as it is done; then print the table, and what was said on the way."""
    rows: list[Row] = []
    fitting, misfits = _fitting(models, methods)
    total = len(data.images) * len(shifts) * sum(map(len, fitting.values()))
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("images"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=total)
        for name, model in models.items():
            bar.update(task, description=name)
            for row in run(
                model,
                data,
                name=name,
                methods=fitting[name],
                shifts=shifts,
                batch_size=batch_size,
                seed=seed,
                progress=lambda images: bar.advance(task, images),
            ):
                bar.update(task, description=f"{name} {row.shift} {row.method}")
                rows.append(row)
                yield row
    console.print(table(rows))
    for sentence in dict.fromkeys([*misfits, *(said for row in rows for said in row.said)]):
        console.print(sentence, highlight=False)


def _fitting(
    models: Mapping[str, nn.Module], methods: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    fitting: dict[str, list[str]] = {name: [] for name in models}
    misfits = []
    for name, model in models.items():
        for method in methods:
            try:
                adapt(model, method)
                fitting[name].append(method)
            except ValueError as error:
                misfits.append(f"Not run on {name}: {error}")
    if not any(fitting.values()):
        raise ValueError(" ".join(misfits))
    return fitting, misfits
