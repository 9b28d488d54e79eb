"""Test-time training as linear algebra: when a little of it helps, and why a lot does not.

The setting of Gandelsman, Sun, Chen and Efros (arXiv 2209.07522): a linear autoencoder trained with
least squares is PCA, so training and test-time training have closed forms. Inputs ``x`` in R^d have
covariance ``S = diag(s1, s2, ..., s2)`` with ``s1 > s2``; the encoder is the first direction
``u1``; the label is ``y = w u1'x``. A test input is seen through an unknown rotation, ``z = R x``.
Test-time training mixes what is known with the only evidence there is::

    M(a) = (1 - a) S + a z z'        prediction(a) = w v1(a)'z,   v1(a) its first eigenvector

``a = 0`` is the fixed model, ``a = 1`` forgets the training data. For a fixed ``R`` the risk
depends on it through the angle ``t`` between ``u1`` and ``R'u1`` alone.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """Dimension, the two variances and the weight of the label.

    Raises:
        ValueError: there is no second direction, or the first is not the strongest.
    """

    dim: int = 10
    first: float = 10.0
    others: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.dim < 2 or not self.first > self.others > 0:
            raise ValueError(
                f"{self}: the analysis needs at least two dimensions, and a first variance above "
                "the others, which are positive."
            )

    @property
    def ratio(self) -> float:
        """How much stronger the first direction is, ``k = s1 / s2``."""
        return self.first / self.others


def encoder(covariance: Tensor, k: int = 1) -> Tensor:
    """Return the first ``k`` eigenvectors ``[..., d, k]``: the best linear autoencoder so wide."""
    vectors: Tensor = torch.linalg.eigh(covariance).eigenvectors
    return vectors[..., -k:].flip(-1)


def mixed(covariance: Tensor, z: Tensor, alpha: float) -> Tensor:
    """Return ``M(a)`` ``[..., d, d]`` of a covariance and one test input ``[..., d]``."""
    return (1 - alpha) * covariance + alpha * z.unsqueeze(-1) * z.unsqueeze(-2)


def prediction(c: Tensor, b: Tensor, alpha: float, setting: Setting) -> Tensor:
    """Return the prediction of an input in closed form.

    ``M(a)`` acts within the plane of ``u1`` and the rest of ``z``, where it turns ``u1`` by::

        phi(a) = 1/2 atan2(2 a c b, (1 - a) (s1 - s2) + a (c^2 - b^2))

    Args:
        c: ``u1'z``.
        b: the norm of the rest of ``z``.
        alpha: between 0 and 1.
        setting: equal variances but the first; with unequal ones ``M(a)`` leaves the plane.
    """
    gap = (1 - alpha) * (setting.first - setting.others)
    phi = torch.atan2(2 * alpha * c * b, gap + alpha * (c**2 - b**2)) / 2
    return setting.weight * (c * phi.cos() + b * phi.sin())


def slope_at_zero(
    angle: float, setting: Setting, error: Literal["absolute", "squared"] = "absolute"
) -> float:
    """Return the right derivative of the risk by ``a`` at 0 for Gaussian inputs.

    Where it is negative, a little test-time training helps. Where it is positive a larger ``a`` may
    still win, in a narrow band: decide on the whole curve, never on the slope.

    Args:
        angle: between ``u1`` and ``R'u1`` in radians, 0 to pi.
        setting: dimension, variances, weight.
        error: the risk is the mean of ``|prediction - y|`` or of its square.
    """
    s2, k, w, d = setting.others, setting.ratio, setting.weight, setting.dim
    if angle == 0 and error == "absolute":  # sign(0) = 0 in the general formula does not give it
        return abs(w) * math.sqrt(2 * setting.first / math.pi) * (d - 1) / (k - 1)
    cos, sin = math.cos(angle), math.sin(angle)
    a = (1 - cos) * (1 + cos - k * cos)
    b = -sin * ((1 - cos) * k + cos)
    v = k * sin**2 + cos**2
    c = (k - 1) * sin * cos
    if error == "squared":
        return 2 * w**2 * s2 / (k - 1) * (a * (v + d - 2) + 2 * b * c)
    sigma2 = k * (1 - cos) ** 2 + sin**2
    bracket = a * (v + d - 2 - b**2 / sigma2) + 2 * b * c
    return abs(w) * math.sqrt(2 * s2 / math.pi) / (k - 1) * bracket / math.sqrt(sigma2)


def ratio_needed(angle: float, dim: int) -> float:
    """Return the ``k = s1 / s2`` above which the risk falls from ``a = 0``; infinite where never.

    ``1 + 1 / cos(angle)`` is enough in every dimension, and needed as the dimension grows.
    """
    if not 0 < angle < math.pi / 2:
        return math.inf
    low, high = 1.0, 1 + 1 / math.cos(angle)
    for _ in range(100):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        falls = slope_at_zero(angle, Setting(dim, middle, 1.0)) < 0
        low, high = (low, middle) if falls else (middle, high)
    return high


@dataclass(frozen=True)
class Curve:
    """Quantities of a shift against ``alpha``, each ``[A]`` in float64.

    With ``prediction = slope * y + residual``, the squared error is bias plus variance:
    ``bias = (1 - slope)^2 E[y^2]``, ``variance`` is that of the residual.

    Args:
        angle: of the rotation in radians; none: drawn uniformly for every input.
        alphas: where.
        risk: mean absolute error.
        error: standard error of the risk.
        slope: of the prediction against the label.
        bias: of the squared error.
        variance: of the squared error.
        gain: how much lower the risk is than at ``alpha = 0``, on the same inputs.
        gain_error: standard error of the gain.
    """

    angle: float | None
    alphas: Tensor
    risk: Tensor
    error: Tensor
    slope: Tensor
    bias: Tensor
    variance: Tensor
    gain: Tensor
    gain_error: Tensor

    @property
    def best(self) -> float:
        """The ``alpha`` of the lowest risk, 0 where the gain could be chance (two errors)."""
        index = int(self.gain.argmax())
        sure = bool(self.gain[index] > 2 * self.gain_error[index])
        return float(self.alphas[index]) if sure else 0.0


def simulate(
    angle: float | None,
    alphas: list[float],
    setting: Setting | None = None,
    draws: int = 400_000,
    seed: int = 0,
) -> Curve:
    """Draw Gaussian inputs, turn them, and return what every ``alpha`` makes of them.

    Args:
        angle: of a rotation in the plane of directions 1 and 2, in radians; none: a rotation drawn
            uniformly for every input.
        alphas: where, each between 0 and 1.
        setting: dimension, variances, weight.
        draws: number of inputs.
        seed: of the draws; the same inputs serve all alphas.

    Raises:
        ValueError: an alpha is not between 0 and 1, or there are fewer than two draws.
    """
    setting = setting or Setting()
    if draws < 2 or not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
        raise ValueError(
            f"A curve needs alphas between 0 and 1 and at least two draws, found alphas={alphas} "
            f"and draws={draws}."
        )
    y, c, b = _inputs(angle, setting, draws, seed)
    fixed = (prediction(c, b, 0.0, setting) - y).abs()
    rows = []
    for alpha in alphas:
        predicted = prediction(c, b, alpha, setting)
        off = (predicted - y).abs()
        slope = (predicted * y).mean() / y.square().mean()
        residual = predicted - slope * y
        gain = fixed - off
        rows.append(
            torch.stack(
                [
                    off.mean(),
                    off.std() / math.sqrt(draws),
                    slope,
                    (1 - slope) ** 2 * y.square().mean(),
                    residual.square().mean(),
                    gain.mean(),
                    gain.std() / math.sqrt(draws),
                ]
            )
        )
    return Curve(angle, torch.tensor(alphas, dtype=torch.float64), *torch.stack(rows).unbind(1))


def _inputs(
    angle: float | None, setting: Setting, draws: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels, and of the inputs seen the part along ``u1`` and the norm of the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(draws, setting.dim, dtype=torch.float64, generator=generator)
    x *= math.sqrt(setting.others)
    x[:, 0] *= math.sqrt(setting.ratio)
    y = setting.weight * x[:, 0]
    if angle is None:  # the norm stays, the direction is any
        direction = torch.randn(draws, setting.dim, dtype=torch.float64, generator=generator)
        z = direction * (x.norm(dim=1) / direction.norm(dim=1)).unsqueeze(1)
        return y, z[:, 0], z[:, 1:].norm(dim=1)
    cos, sin = math.cos(angle), math.sin(angle)
    c = cos * x[:, 0] - sin * x[:, 1]
    turned = sin * x[:, 0] + cos * x[:, 1]
    return y, c, (turned.square() + x[:, 2:].square().sum(1)).sqrt()


def why_none(angle: float | None, setting: Setting) -> str | None:
    """Return why no ``a > 0`` is expected to help, or none where one is.

    The four cases: nothing is turned out of ``u1``; the rotation is uniform; the angle is 90
    degrees or more; the first direction is too weak. In a narrow band beside the threshold of that
    last one some ``a > 0`` helps all the same: only the curve tells.
    """
    if angle is None:
        return "the rotation is uniform: the sign of u1'z is a coin, and stretching makes it worse"
    if angle == 0:
        return "u1 is not turned: the fixed model is right, and stretching makes it worse"
    if angle >= math.pi / 2:
        return "u1 is turned by 90 degrees or more"
    if setting.ratio < (needed := ratio_needed(angle, setting.dim)):
        return f"the first direction is too weak: s1/s2 = {setting.ratio:g} of {needed:.3f} needed"
    return None
