"""How many frames a window of test-time training on a video should hold."""

import math


def excess_loss(
    window: float, motion: float, noise: float, smoothness: float = 1.0, convexity: float = 1.0
) -> float:
    """Return the bound on the excess loss of one gradient step on a window of frames.

    ``(k^2 beta^2 eta^2 + sigma^2 / k) / (2 alpha)``: older frames differ more, fewer are noisier.

    Args:
        window: number of frames, k.
        motion: how far the input moves from frame to frame at most, eta.
        noise: standard deviation of the self-supervised gradient around the main task's, sigma.
        smoothness: of the main loss in its input, beta.
        convexity: strong convexity of the main loss, alpha.

    Raises:
        ValueError: the window holds no frame, or a constant is not positive.

    Source: Wang, Sun, et al., "Test-time training on video streams", JMLR 2025.
    """
    _require(window=window, motion=motion, noise=noise, smoothness=smoothness, convexity=convexity)
    drift = (window * smoothness * motion) ** 2
    return (drift + noise**2 / window) / (2 * convexity)


def best_window(motion: float, noise: float, smoothness: float = 1.0) -> float:
    """Return the window at which the bound is lowest: ``(sigma^2 / (2 beta^2 eta^2))^(1/3)``."""
    _require(motion=motion, noise=noise, smoothness=smoothness)
    return math.cbrt(noise**2 / (2 * (smoothness * motion) ** 2))


def _require(**constants: float) -> None:
    odd = {name: value for name, value in constants.items() if not 0 < value < math.inf}
    if odd:
        raise ValueError(
            f"The bound is for positive constants, found {odd}. Without motion, say, every frame "
            "is as good as the last, and no window is too long."
        )
