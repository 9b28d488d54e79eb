"""A progress bar while rows are made, and the table of them; shared by demo and bench."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from testtime.bench import Ledger, Model, Spec
from testtime.bench.data import Released
from testtime.bench.ledger import opened
from testtime.bench.row import key
from testtime.bench.run import Engine, check_fit, execute, load, samples
from testtime.bench.summary import compare
from testtime.bench.table import terminal
from testtime.shifts.data import Data


def show(
    models: Mapping[str, nn.Module | str],
    data: Data | Released,
    source: Data | None,
    specs: Sequence[Spec],
    *,
    out: Path | None = None,
    engine: Engine = "local",
    allow: Sequence[str] = (),
    command: str = "",
) -> Ledger:
    """Run the rows behind a progress bar, print the tables and what was said; return the rows."""
    held = load(models)
    for model in held.values():
        check_fit(model, data, allow)
    if out is None:
        return _run(Ledger(), specs, held, data, source, engine, command)
    with opened(out) as ledger:
        return _run(ledger, specs, held, data, source, engine, command)


def _run(
    ledger: Ledger,
    specs: Sequence[Spec],
    models: Mapping[str, Model],
    data: Data | Released,
    source: Data | None,
    engine: Engine,
    command: str,
) -> Ledger:
    console = Console()
    total = sum(samples(spec, data) for spec in specs)
    asked = {key(spec, models[spec.model], data) for spec in specs}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("images"), TimeRemainingColumn(), console=console) as bar:
        task, now, seen, missed = bar.add_task("", total=total), specs[0], 0, 0

        def watch(spec: Spec, images: int, wrong: int) -> None:
            nonlocal now, seen, missed
            seen, missed = (seen, missed) if spec == now else (0, 0)
            now, seen, missed = spec, seen + images, missed + wrong
            what = f"{spec.model} {' '.join(spec.shifts[:2])} {spec.method}"
            bar.update(task, advance=images, description=f"{what} {missed / seen:.1%} wrong")

        for _ in execute(specs, models, data, source, ledger, engine, watch, command):
            pass
    shown = ledger.filter(lambda row: row["key"] in asked)
    console.print(terminal(compare(shown)))
    said = [sentence for row in shown for sentence in row.get("said", ())]
    for sentence in dict.fromkeys(said):
        console.print(sentence, highlight=False)
    return shown
