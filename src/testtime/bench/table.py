"""Comparisons as tables: on the terminal, in Markdown, in LaTeX."""

from rich import box
from rich.console import Group
from rich.table import Table

from testtime.bench.summary import Comparison, Line

MEAN = "mean"
MOST = 4  # shifts with a column each on a terminal; the report shows them all


def terminal(comparisons: list[Comparison]) -> Group:
    """Return the errors in percent, a table for each setting; the lowest of a column is bold.

    Over few shifts each has a column, over many their mean and the worst stand for them.
    """
    return Group(*(_terminal(comparison) for comparison in comparisons))


def _terminal(comparison: Comparison) -> Table:
    shifts = comparison.shifts if len(comparison.shifts) <= MOST else []
    out = Table(
        title=f"Error in %: {comparison.setting}",
        caption=_caption(comparison),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption_justify="left",
    )
    out.add_column("method", no_wrap=True)
    for head in [*map(_head, shifts), MEAN, "±95%", "gain", "worst", "ms"]:
        out.add_column(head, justify="right", no_wrap=True)
    out.add_column("worst shift")
    lowest = _lowest(comparison)
    for line in comparison.done:
        cells = [_bold(line.by_shift.get(s), lowest[s], "[bold]{}[/bold]") for s in shifts]
        low, high = line.error_interval
        out.add_row(
            line.method,
            *cells,
            _bold(line.error, lowest[MEAN], "[bold]{}[/bold]"),
            f"{50 * (high - low):.2f}",
            f"{100 * line.gain:+.2f}",
            f"{100 * line.worst[1]:.2f}",
            f"{line.milliseconds[0]:.2f}",
            line.worst[0],
        )
    return out


def markdown(comparisons: list[Comparison]) -> str:
    """Return the errors in percent as Markdown tables, the lowest of a shift in bold."""
    return "\n\n".join(_markdown(comparison) for comparison in comparisons)


def _markdown(comparison: Comparison) -> str:
    shifts, lowest = comparison.shifts, _lowest(comparison)
    heads = ["method", *(_head(s).replace("\n", " ") for s in shifts), MEAN, "95 % interval"]
    lines = [
        f"{comparison.setting}; error in %.",
        "",
        f"| {' | '.join(heads)} |",
        "| --- |" + " ---: |" * (len(heads) - 1),
    ]
    for line in comparison.done:
        cells = [_bold(line.by_shift.get(s), lowest[s], "**{}**") for s in shifts]
        cells += [_bold(line.error, lowest[MEAN], "**{}**"), _interval(line)]
        lines.append(f"| `{line.method}` | {' | '.join(cells)} |")
    if caption := _caption(comparison):
        lines += ["", caption]
    return "\n".join(lines)


def latex(comparisons: list[Comparison]) -> str:
    """Return the errors in percent as LaTeX tables (booktabs), the lowest of a shift in bold."""
    return "\n\n".join(_latex(comparison) for comparison in comparisons)


def _latex(comparison: Comparison) -> str:
    shifts, lowest = comparison.shifts, _lowest(comparison)
    heads = ["method", *(_escape(_head(s).replace("\n", " ")) for s in shifts), MEAN, "95\\,\\%"]
    lines = [
        "\\begin{table}",
        f"\\caption{{Error in \\%: {_escape(str(comparison.setting))}. "
        f"{_escape(_caption(comparison))}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        "\\toprule",
        " & ".join(heads) + " \\\\",
        "\\midrule",
    ]
    for line in comparison.done:
        cells = [_bold(line.by_shift.get(s), lowest[s], "\\textbf{{{}}}") for s in shifts]
        cells += [_bold(line.error, lowest[MEAN], "\\textbf{{{}}}"), _interval(line)]
        lines.append(f"{_escape(line.method)} & {' & '.join(cells)} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"])


def _caption(comparison: Comparison) -> str:
    said = []
    if not comparison.even:
        said.append("Not all methods ran under all shifts: their means are not comparable.")
    for line in comparison.lines:
        if line.rows and line.collapsed:
            said.append(
                f"{line.method} collapsed under {', '.join(dict.fromkeys(line.collapsed))}."
            )
        if line.failed:
            said.append(f"{line.method} failed: {' '.join(line.failed)}")
    return " ".join(said)


def _lowest(comparison: Comparison) -> dict[str, float]:
    found = {MEAN: min((line.error for line in comparison.done), default=0.0)}
    for shift in comparison.shifts:
        found[shift] = min(
            line.by_shift[shift] for line in comparison.done if shift in line.by_shift
        )
    return found


def _bold(error: float | None, lowest: float, form: str) -> str:
    if error is None:
        return "-"
    shown = f"{100 * error:.2f}"
    return form.format(shown) if error == lowest else shown


def _interval(line: Line) -> str:
    low, high = line.error_interval
    return f"{100 * low:.2f} to {100 * high:.2f}"


def _head(shift: str) -> str:
    return shift.replace("_", "\n").replace(":", "\n")


def _escape(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text)
