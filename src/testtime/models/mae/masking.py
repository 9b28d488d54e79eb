"""What is hidden, what is to be predicted, and how far a prediction is from it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Masking:
    """Which patches of each image are seen.

    Args:
        keep: the visible patches ``[N, K]``, int64, in the order in which the encoder sees them.
        restore: for every patch, row by row, its place among visible-then-hidden ``[N, L]``, int64.
        mask: is a patch hidden? ``[N, L]``, boolean, row by row.
    """

    keep: Tensor
    restore: Tensor
    mask: Tensor


def keep_count(patches: int, ratio: float) -> int:
    """Return how many patches stay visible: ``int(patches * (1 - ratio))``, as rounding has it.

    That is not always the exact product: of 100 patches a ratio of 0.9 keeps 9.

    Raises:
        ValueError: the ratio is not in [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(
            f"A mask ratio is the share of patches that are hidden, but {ratio} was given. "
            "Choose it between 0 and 1, such as 0.75."
        )
    return int(patches * (1 - ratio))


def require_both(patches: int, ratio: float) -> int:
    """Return how many patches stay visible where some must be seen and some be hidden.

    Raises:
        ValueError: the ratio hides nothing, or all.
    """
    keep = keep_count(patches, ratio)
    if not 0 < keep < patches:
        what = "hides none" if keep else "hides all"
        nearest = f"{1 / patches:.3g} and {(patches - 1) / patches:.3g}"
        raise ValueError(
            f"A mask ratio of {ratio} {what} of {patches} patches, so there is nothing to "
            f"{'predict' if keep else 'predict from'}. Choose one between {nearest}."
        )
    return keep


def masking(order: Tensor, keep: int) -> Masking:
    """Return the masking in which the first ``keep`` patches of an order are visible.

    Args:
        order: patch indices ``[N, L]``, a permutation a row. A random one is
            ``noise.argsort(dim=1, stable=True)`` of uniform noise.
        keep: how many stay visible.

    Raises:
        ValueError: the order is not two-dimensional.
    """
    if order.dim() != 2:
        raise ValueError(
            f"An order of patches has a row for every image, but its shape is {[*order.shape]}. "
            "Give [N, L], or [1, L] for one order."
        )
    # The inverse of a permutation is the order that sorts it.
    restore = order.argsort(dim=1)
    return Masking(order[:, :keep], restore, restore >= keep)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Return images ``[N, C, H, W]`` as patches ``[N, L, patch * patch * C]``, row by row.

    A patch is a vector in the order row, column, channel: the channel runs fastest.

    Raises:
        ValueError: patches do not divide the images.
    """
    n, channels, height, width = images.shape
    rows, columns = grid_of((height, width), patch)
    tiles = images.reshape(n, channels, rows, patch, columns, patch)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(n, rows * columns, patch * patch * channels)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Return patches ``[N, L, patch * patch * C]`` as images ``[N, C, H, W]``."""
    n, channels = patches.shape[0], patches.shape[2] // patch**2
    tiles = patches.reshape(n, *grid, patch, patch, channels)
    image = tiles.permute(0, 5, 1, 3, 2, 4)
    return image.reshape(n, channels, grid[0] * patch, grid[1] * patch)


def grid_of(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return the rows and columns of patches in an image of that height and width.

    Raises:
        ValueError: patches do not divide the image.
    """
    if patch < 1 or size[0] < patch or size[1] < patch or size[0] % patch or size[1] % patch:
        raise ValueError(
            f"Patches of {patch} x {patch} pixels do not divide an image of {size[0]} x {size[1]}. "
            "Resize or crop the image to a multiple of the patch."
        )
    return size[0] // patch, size[1] // patch


def targets(patches: Tensor, normalised: bool) -> Tensor:
    """Return what a decoder predicts for patches ``[N, L, n]``: their pixels, plain or normalised.

    Normalised, every patch on its own: ``(t - mean) / sqrt(var + 1e-6)`` with the unbiased
    variance, so that a flat patch has target 0.
    """
    if not normalised:
        return patches
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error over the hidden patches of the whole batch, a scalar.

    Args:
        prediction: ``[N, L, n]``.
        target: ``[N, L, n]``, or ``[1, L, n]`` for copies of one image.
        mask: where a patch is hidden ``[N, L]``, boolean or 0 and 1. Images may hide different
            numbers of patches; every hidden patch counts the same.
    """
    errors = (prediction - target).square().mean(dim=-1)
    return (errors * mask).sum() / mask.sum()
