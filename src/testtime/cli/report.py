"""Make a page, or the main table, of a ledger."""

from pathlib import Path

import click


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "md", "latex"]),
    default="html",
    show_default=True,
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Default: the ledger's name with .html; md and latex go to the terminal.",
)
def command(files: tuple[Path, ...], form: str, out: Path | None) -> None:
    """Make a page, or the main table, of one ledger or several.

    The page is one file that opens without a network. Needs the extra report:
    pip install 'testtime[report]'.
    """
    from testtime.bench.ledger import Ledger
    from testtime.bench.summary import compare
    from testtime.bench.table import latex, markdown

    first, *rest = (Ledger.read(file) for file in files)
    ledger = first.merge(*rest) if rest else first
    if not len(ledger):
        raise click.ClickException(f"{files[0]} holds no rows. Run the bench first.")
    if form == "html":
        from testtime.bench.report import page

        out = out or files[0].with_suffix(".html")
        out.write_text(page(ledger), encoding="utf-8")
        click.echo(f"The report is in {out}.")
        return
    text = (markdown if form == "md" else latex)(compare(ledger))
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    else:
        click.echo(text)
