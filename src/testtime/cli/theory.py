"""Show where a little test-time training helps, and why a lot does not."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from testtime.theory import Curve

_ALPHAS = (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1)


@click.group()
def command() -> None:
    """Show where a little test-time training helps, and why a lot does not."""


@command.command("bias-variance")
@click.option(
    "--angles",
    default="0,0.2,0.4,0.6,0.8,1,uniform",
    show_default=True,
    help="Shifts: rotations in radians, or uniform, with commas between.",
)
@click.option("--dim", default=10, show_default=True, help="Dimension of the inputs.")
@click.option("--ratio", default=10.0, show_default=True, help="First variance over the others.")
@click.option("--draws", default=200_000, show_default=True, type=click.IntRange(2))
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The picture: .svg, .png or .pdf.  [default: bias-variance.svg, where matplotlib is]",
)
def bias_variance(
    angles: str, dim: int, ratio: float, draws: int, seed: int, out: Path | None
) -> None:
    """Print and draw risk, bias and variance against alpha, for several shifts.

    Linear models: the model is the first principal direction of the training data, and test-time
    training mixes a share alpha of the one test input into their covariance. alpha = 0 is the
    fixed model, alpha = 1 forgets the training data.
    """
    from testtime.theory import Setting, simulate, slope_at_zero, why_none
    from testtime.theory.picture import draw, grid

    shifts = [_angle(text) for text in angles.split(",")]
    setting = Setting(dim, ratio, 1.0)
    alphas = sorted({*_ALPHAS, *grid()})
    curves = [simulate(angle, alphas, setting, draws, seed) for angle in shifts]
    click.echo(_table(curves))
    worst = max(float(curve.error.max()) for curve in curves)
    click.echo(
        f"\nd = {dim}, s1/s2 = {ratio:g}, w = 1; {draws} draws, seed {seed}; standard error of a "
        f"risk at most {worst:.4f}.\n"
    )
    for curve in curves:
        index = int(curve.gain.argmax())
        text = f"{_name(curve)}: best alpha {curve.best:.3g}"
        if curve.best:
            text += f", risk lower by {curve.gain[index]:.4f} +- {curve.gain_error[index]:.4f}"
        if curve.angle is not None:
            text += f"; slope of the risk at 0 {slope_at_zero(curve.angle, setting):+.3f}"
        if not curve.best and (reason := why_none(curve.angle, setting)):
            text += f"; {reason}"
        click.echo(f"{text}.")
    try:
        draw(curves, setting, out or Path("bias-variance.svg"))
        click.echo(f"The picture is in {out or 'bias-variance.svg'}.")
    except ImportError as error:
        if out:
            raise
        click.echo(f"No picture. {error}")


def _angle(text: str) -> float | None:
    if text.strip() == "uniform":
        return None
    try:
        angle = float(text)
    except ValueError:
        angle = -1.0
    if not 0 <= angle <= 3.1416:
        raise click.UsageError(
            f"A shift is an angle from 0 to pi radians, or uniform, but '{text.strip()}' was given."
        )
    return angle


def _table(curves: "list[Curve]") -> str:
    """Return risk, bias and variance of every shift, a line each, in 78 columns."""
    lines = ["turned by  alpha   " + "".join(f"{alpha:>6g}" for alpha in _ALPHAS)]
    for curve in curves:
        alphas = curve.alphas.tolist()
        rows = {"risk": curve.risk, "bias": curve.bias, "variance": curve.variance}
        for what, values in rows.items():
            name = _name(curve) if what == "risk" else ""
            cells = [f"{float(values[alphas.index(alpha)]):.3f}"[:5] for alpha in _ALPHAS]
            lines.append(f"{name:<9}  {what:<8}" + "".join(f"{cell:>6}" for cell in cells))
    return "\n".join(lines)


def _name(curve: "Curve") -> str:
    return "uniform" if curve.angle is None else f"{curve.angle:g}"
