"""The charts of the report, as SVG that takes the page's own colours."""

import io
import re
from collections.abc import Sequence
from typing import Any

from testtime.bench.spec import parse_method
from testtime.bench.summary import Line

# Okabe and Ito's colours, which colour-blind readers tell apart, without black and yellow: those
# vanish on a dark or on a light page.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
MARKS = ("-", "--", ":", "-.")
SHAPES = ("o", "s", "^", "D")
MOST = 14  # lines in one chart that can still be told apart
_INK = "#010203"  # replaced by the page's text colour


def over_stream(lines: Sequence[Line]) -> str:
    """Return error over the stream, a line for each method, as long as there is one stream each."""
    streams = {line.method: line.rows[0]["results"]["error_over_stream"] for line in lines[:MOST]}
    single = all(len(line.rows) == 1 for line in lines)
    if not single or max(map(len, streams.values())) < 4:
        return ""
    figure, axes = _axes()
    for number, (method, errors) in enumerate(streams.items()):
        places = [100 * (k + 0.5) / len(errors) for k in range(len(errors))]
        axes.plot(
            places,
            [100 * error for error in errors],
            MARKS[number // len(COLOURS) % len(MARKS)],
            color=COLOURS[number % len(COLOURS)],
            label=method,
            linewidth=1.5,
        )
    axes.set(xlabel="share of the stream, %", ylabel="error, %", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK, ncols=2)
    return _svg(figure, "Error over the stream for each method")


def cost(lines: Sequence[Line]) -> str:
    """Return gain against time an image, a point for each method."""
    if len(lines) < 2:
        return ""
    figure, axes = _axes()
    for number, line in enumerate(lines):
        low, high = line.gain_interval
        colour = COLOURS[number % len(COLOURS)]
        time = max(line.milliseconds[0], 1e-4)
        axes.plot([time, time], [100 * low, 100 * high], color=colour, linewidth=1)
        shape = SHAPES[number // len(COLOURS) % len(SHAPES)]
        axes.plot([time], [100 * line.gain], shape, color=colour, markersize=5, label=line.method)
    axes.axhline(0, color=_INK, linewidth=0.6)
    axes.set(xlabel="time an image, ms (median)", ylabel="gain over source, points")
    _logarithmic(axes)
    axes.legend(
        frameon=False, fontsize=8, labelcolor=_INK, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    return _svg(figure, "Gain over the source against time an image")


def sensitivity(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Return error against a setting, for methods that ran with several values of one alone."""
    found: dict[tuple[str, str], list[tuple[float, Line]]] = {}
    for line in lines:
        for setting, value in _numbers(line.method).items():
            rest = [part for part in line.method.split(":") if not part.startswith(f"{setting}=")]
            found.setdefault((":".join(rest), setting), []).append((value, line))
    strips = []
    for (method, setting), points in found.items():
        points += [(_default(method, setting), line) for line in lines if line.method == method]
        if len(points) < 3:
            continue
        points.sort(key=lambda point: point[0])
        figure, axes = _axes(height=1.6)
        values = [value for value, _ in points]
        axes.plot(values, [100 * line.error for _, line in points], "o-", color=COLOURS[0])
        spread = [line.error_interval for _, line in points]
        axes.fill_between(
            values,
            [100 * low for low, _ in spread],
            [100 * high for _, high in spread],
            color=COLOURS[0],
            alpha=0.2,
            linewidth=0,
        )
        if min(values) > 0 and max(values) / min(values) > 20:
            _logarithmic(axes)
        axes.set(xlabel=setting, ylabel="error, %")
        strips.append((f"{method}: {setting}", _svg(figure, f"Error of {method} by {setting}")))
    return strips


def _numbers(spec: str) -> dict[str, float]:
    parts = dict(part.split("=", 1) for part in spec.split(":")[1:] if "=" in part)
    numbers = {}
    for name, text in parts.items():
        try:
            numbers[name] = float(text)
        except ValueError:
            continue
    return numbers


def _default(spec: str, setting: str) -> float:
    method = parse_method(spec)
    return float(getattr(method if hasattr(method, setting) else method.optimizer, setting))


def _logarithmic(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 20 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _axes(height: float = 2.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.xaxis.label.set(color=_INK, size=9)
    axes.yaxis.label.set(color=_INK, size=9)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    import matplotlib

    out = io.StringIO()
    # Text stays text, ids are the same every time, and no date goes in.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The page's own font, no comments, and no digits that nobody sees: a third of the size.
    svg = re.sub(r"\s*\n\s*", " ", re.sub(r"<!--.*?-->", "", svg))
    svg = re.sub(r"font: (\S+) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"(\.\d\d)\d+", r"\1", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (?:width|height)="[\d.]+pt"', "", head)
    return f'{head} role="img" aria-label="{title}">{rest}'
