"""Put a method through the laws on your model, or on tiny networks of every kind."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from testtime.adaptation.contract import Result


@click.command()
@click.option("--method", "methods", multiple=True, help="tent, ...; may be given several times.")
@click.option("--model", help="package.module:factory, which returns a model or (model, batches).")
@click.option("--all", "everything", is_flag=True, help="Every method.")
def command(methods: tuple[str, ...], model: str | None, everything: bool) -> None:
    """Put a method through the laws on your model, or on tiny networks of every kind.

    A factory that returns a model alone gets random images of the size that the model declares, or
    of 32 x 32. What is refused at once, with a sentence, holds. Exit code 1: a law is broken.
    """
    from rich.console import Console
    from rich.progress import track

    from testtime.adaptation.contract import LAWS, check_method
    from testtime.adaptation.methods import METHODS, find

    if everything == bool(methods):
        raise click.UsageError("Give either --method or --all.")
    try:
        chosen = list(METHODS) if everything else [find(name).name for name in methods]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--method") from None
    console = Console()
    subjects = dict(_subjects(model))
    broken = False
    for method in chosen:
        results: dict[str, list[Result]] = {}
        for name, (network, batches) in track(
            subjects.items(), description=method, console=console, transient=True
        ):
            results[name] = check_method(method, network, batches)
        console.print(_table(method, results))
        for sentence in _sentences(results):
            console.print(sentence, highlight=False, markup=False)
        broken |= not all(result.passed for laws in results.values() for result in laws)
    laws = "; ".join(map(str, LAWS))
    console.print(f"The laws: {laws}.", highlight=False)
    if broken:
        raise click.exceptions.Exit(1)


def _subjects(spec: str | None) -> Iterator[tuple[str, tuple[Any, list[Any]]]]:
    import torch
    from torch import nn

    from testtime.models.load import call_factory
    from testtime.models.tiny import KINDS, tiny

    if spec is None:
        yield from ((kind, tiny(kind)) for kind in KINDS)
        return
    try:
        made = call_factory(spec)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--model") from None
    model, batches = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise click.BadParameter(
            f"'{spec}' returned {type(model).__name__}, not a torch.nn.Module. Return the model, "
            "or the model and batches.",
            param_hint="--model",
        )
    if batches is None:
        config = getattr(model, "pretrained_cfg", None) or {}
        shape = tuple(config.get("input_size", (3, 32, 32)))
        generator = torch.Generator().manual_seed(0)
        batches = [torch.rand(4, *shape, generator=generator) for _ in range(3)]
    yield spec.partition(":")[2], (model, list(batches))


_CELLS = {"holds": "ok", "does not apply": "-", "broken": "[bold red]NO[/bold red]"}


def _table(method: str, results: "dict[str, list[Result]]") -> "Table":
    from rich.table import Table

    table = Table(title=f"The laws under {method}")
    table.add_column("")
    for result in next(iter(results.values())):
        table.add_column(str(result.law.number), justify="center")
    for name, laws in results.items():
        table.add_row(name, *(_CELLS[result.verdict] for result in laws))
    return table


def _sentences(results: "dict[str, list[Result]]") -> Iterator[str]:
    """Yield what was broken, refused or did not apply, each sentence once, with its models."""
    said: dict[str, list[str]] = {}
    for name, laws in results.items():
        for result in laws:
            if result.detail:
                law = f"{result.verdict}, law {result.law}: " if result.applies else ""
                said.setdefault(f"{law}{result.detail}", []).append(name)
    for sentence, names in said.items():
        yield f"{', '.join(dict.fromkeys(names))}: {sentence}"
