"""List the methods, or show one: what it adapts, needs and costs, where it was tested."""

import click


@click.command()
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the methods, or show one: what it adapts, needs and costs, where it was tested.

    Passes are forwards and backwards of an image in one inner step, at most.
    """
    import inspect
    import sys

    from testtime.adaptation.methods import METHODS, find

    if name is None:
        _list()
        return
    try:
        method = find(name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    kind = METHODS[method.name]
    click.echo(f"{method!r}\n")
    click.echo(f"{inspect.cleandoc(sys.modules[kind.__module__].__doc__ or '')}\n")
    click.echo(f"{inspect.getdoc(kind)}\n")
    for what, words in _card(method.name).items():
        click.echo(f"{what:10} {words}")
    for preset, changes in kind.presets.items():
        settings = kind(**changes).configuration()
        shown = ", ".join(f"{key}={settings[key]}" for key in changes)
        click.echo(f"preset     {preset}: {shown}")


def _list() -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from testtime.adaptation.methods import METHODS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("method", "adapts", "needs", "passes", "tested by its authors on"):
        table.add_column(head)
    for name in METHODS:
        card, (forwards, backwards) = _card(name), METHODS[name]().cost
        passes = f"{forwards} + {backwards}"
        table.add_row(name, card["adapts"], card["needs"], passes, card["tested on"])
    Console().print(table)


def _card(name: str) -> dict[str, str]:
    from testtime.adaptation.methods import METHODS

    method = METHODS[name]()
    needs = ["source data"] if method.needs_source else []
    if method.smallest_batch > 1:
        needs.append(f"batches of {method.smallest_batch} or more")
    needs += [method.needs] if method.needs else []
    forwards, backwards = method.cost
    looks = "; looks at values on the host" if method.looks else ""
    return {
        "adapts": method.adapts,
        "needs": ", ".join(needs) or "-",
        "cost": f"{forwards} forward, {backwards} backward{looks}",
        "answers": f"{method.answers} the update by its own batch",
        "tested on": method.tested or "-",
    }
