"""Risk, bias and variance against alpha, drawn with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testtime.theory.linear import Curve, Setting

_SMALL: dict[str, Any] = {"ha": "right", "fontsize": 8, "color": "0.35"}


def draw(curves: Sequence[Curve], setting: Setting, path: str | Path) -> None:
    """Write a picture of three panels, a line a shift, with the best alpha of each marked.

    Alpha runs from 0 to 1 on an axis of square roots, for what matters lies near 0.

    Args:
        curves: of one setting.
        setting: that setting.
        path: its ending says the kind: ``.svg``, ``.png``, ``.pdf``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "The picture is drawn with matplotlib: pip install 'testtime[report]'."
        ) from error
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    turned = [curve for curve in curves if curve.angle is not None]
    panels: Any = figure.subplots(1, 3, sharex=True)
    color: Any
    titles = ("Risk: mean absolute error", "Bias of the squared error", "Variance")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xscale("function", functions=(lambda a: abs(a) ** 0.5, lambda r: r**2))
        panel.set_xlim(0, 1)
        panel.set_xticks([0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.7, 1])
        panel.set_xticklabels(["0", ".01", ".05", ".1", ".2", ".4", ".7", "1"], fontsize=8)
        panel.tick_params(axis="y", labelsize=8)
        panel.set_xlabel("alpha: share of the test input", fontsize=9)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for curve in curves:
        if curve.angle is None:
            color, label, style = "0.35", "uniform", "--"
        else:
            place = turned.index(curve) / max(len(turned) - 1, 1)
            color, label, style = colormaps["viridis"](0.87 * place), f"{curve.angle:g}", "-"
        alphas = curve.alphas.tolist()
        for panel, values in zip(panels, (curve.risk, curve.bias, curve.variance), strict=True):
            panel.plot(alphas, values.tolist(), style, color=color, label=label, linewidth=1.5)
        lowest = alphas.index(curve.best)
        panels[0].plot(curve.best, float(curve.risk[lowest]), "o", color=color, markersize=5)
    # A shift that nothing helps against would flatten all others, so it may leave a panel.
    for panel, name in zip(panels, ("risk", "bias", "variance"), strict=True):
        heights = [float(getattr(curve, name).max()) for curve in turned or curves]
        panel.set_ylim(0, 1.6 * max(heights) if name == "risk" else 1.1 * max(heights))
        beyond = [c for c in curves if float(getattr(c, name).min()) > panel.get_ylim()[1]]
        if beyond:
            panel.text(0.98, 0.95, "uniform: above", transform=panel.transAxes, **_SMALL)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside right center",
        title="turned by\n(radians)",
        fontsize=8,
        title_fontsize=8,
        frameon=False,
    )
    figure.suptitle(
        f"Linear test-time training, d = {setting.dim}, s1/s2 = {setting.ratio:g}; "
        "a dot marks the best alpha",
        fontsize=11,
    )
    undated = {"Date": None} if Path(path).suffix == ".svg" else None
    figure.savefig(path, dpi=150, metadata=undated)


def grid(points: int = 46) -> list[float]:
    """Return alphas from 0 to 1, closer together near 0."""
    return [round((i / (points - 1)) ** 2, 4) for i in range(points)]
