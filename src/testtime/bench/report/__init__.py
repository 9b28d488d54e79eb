"""A ledger as one page of HTML that opens from disk, with no network."""

from importlib.resources import files
from typing import Any

from testtime.bench.ledger import Ledger, Row
from testtime.bench.report import charts
from testtime.bench.summary import Comparison, Line, compare

NEED = "The report needs {}: pip install 'testtime[report]'."


def page(ledger: Ledger) -> str:
    """Return the page.

    Raises:
        ValueError: the ledger holds no rows.
        ImportError: it needs the extra ``report``.
    """
    if not len(ledger):
        raise ValueError("The ledger holds no rows. Run the bench first.")
    try:
        import jinja2
        import matplotlib  # noqa: F401 - charts use it
    except ImportError as error:
        raise ImportError(NEED.format(error.name)) from error
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "interval": _interval, "signed": _signed}
    template = files(__name__).joinpath("page.html").read_text(encoding="utf-8")
    comparisons = compare(ledger)
    return environment.from_string(template).render(
        comparisons=[_section(number, c) for number, c in enumerate(comparisons)],
        failures=[_failure(row) for row in ledger if row["status"] == "failed"],
        models=_distinct(ledger, "model"),
        data=_distinct(ledger, "data"),
        versions=_distinct(ledger, "versions"),
        methods=_methods(ledger),
        commands=list(dict.fromkeys(row.get("command", "") for row in ledger)),
        doubts=[d for d in ledger.check() if " failed: " not in d],
        rows=len(ledger),
        finished=max(row["measured"]["finished"] for row in ledger)[:10],
        hosts=sorted({_host(row) for row in ledger}),
    )


def _section(number: int, comparison: Comparison) -> dict[str, Any]:
    done = comparison.done
    return {
        "id": f"s{number}",
        "setting": str(comparison.setting),
        "verdict": verdict(comparison),
        "lines": done,
        "shifts": comparison.shifts,
        "even": comparison.even,
        "shade": {(line.method, s): _shade(line, s) for line in done for s in comparison.shifts},
        "stream": charts.over_stream(done),
        "cost": charts.cost(done),
        "strips": charts.sensitivity(done),
    }


def verdict(comparison: Comparison) -> list[str]:
    """Return in sentences which method is best, how surely, and where methods failed."""
    done = comparison.done
    if not done:
        return ["No method has a row that is done."]
    best = done[0]
    low, high = best.error_interval
    said = [
        f"Lowest error: {best.method}, {100 * best.error:.1f} % "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %)."
    ]
    gain_low, gain_high = best.gain_interval
    if best.method != "source":
        said.append(
            f"Against the unadapted source on the same images: {100 * best.gain:+.1f} points of "
            f"accuracy ({100 * gain_low:+.1f} to {100 * gain_high:+.1f})."
        )
    close = [line.method for line in done[1:] if line.error_interval[0] < high]
    if close:
        said.append(f"Not clearly behind it: {', '.join(close)}.")
    worse = [line.method for line in done if line.gain_interval[1] < 0]
    if worse:
        said.append(f"Clearly worse than not adapting: {', '.join(worse)}.")
    for line in comparison.lines:
        if line.rows and line.collapsed:
            where = ", ".join(dict.fromkeys(line.collapsed))
            said.append(f"Collapsed to few classes: {line.method} under {where}.")
        if line.failed:
            said.append(f"Failed: {line.method}.")
    return said


def _shade(line: Line, shift: str) -> str:
    """Return a cell's colour: how far the error is from the source's, blue below, orange above."""
    if shift not in line.by_shift:
        return "transparent"
    theirs = [r["shifts"][shift]["source_error"] for r in line.rows if shift in r["shifts"]]
    distance = line.by_shift[shift] - sum(theirs) / len(theirs)
    strength = min(abs(distance) / 0.3, 1.0) ** 0.6
    hue = "var(--better)" if distance < 0 else "var(--worse)"
    return f"color-mix(in srgb, {hue} {100 * strength:.0f}%, transparent)"


def _failure(row: Row) -> dict[str, str]:
    return {
        "method": row["spec"]["method"],
        "where": f"{row['model']['name']}, {' '.join(row['spec']['shifts'])}",
        "error": row["error"],
    }


def _methods(ledger: Ledger) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in ledger:
        about = {**row["method"]["configuration"]}
        if row["status"] == "done":
            about["adapts"] = f"{row['adapts']['tensors']} tensors, {row['adapts']['share']:.2%}"
            about["said"] = " ".join(row["said"])
        held = found.setdefault(row["spec"]["method"], about)
        held.update({k: v for k, v in about.items() if v and not held.get(k)})
    return found


def _distinct(ledger: Ledger, what: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in ledger:
        if row[what] not in found:
            found.append(row[what])
    return found


def _host(row: Row) -> str:
    measured = row["measured"]
    return f"{measured['host']} ({measured['device']}, {measured['threads']} threads)"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _interval(ends: tuple[float, float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.2f}"
