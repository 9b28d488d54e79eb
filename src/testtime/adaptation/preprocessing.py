"""Do the values of a batch fit what the model was trained on?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_KNOWN = {
    "the ImageNet mean and standard deviation": IMAGENET,
    "mean 0.5 and standard deviation 0.5": HALF,
    "CLIP's mean and standard deviation": CLIP,
    "no normalisation ([0, 1])": ((0.0,), (1.0,)),
}


@dataclass(frozen=True)
class Preprocessing:
    """How images in [0, 1] become a model's input: ``(image - mean) / std`` for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(
        cls, mean: float | Sequence[float] | None, std: float | Sequence[float] | None
    ) -> "Preprocessing | None":
        """Return the preprocessing of a mean and std, each a value for each channel or for all.

        Raises:
            ValueError: one of the two is missing, or they are not of one length.
        """
        if mean is None and std is None:
            return None
        if mean is None or std is None:
            raise ValueError("mean and std go together: give both, or neither.")
        pair = [(float(v),) if isinstance(v, int | float) else tuple(v) for v in (mean, std)]
        if len(pair[0]) != len(pair[1]):
            raise ValueError(
                f"mean has {len(pair[0])} values and std {len(pair[1])}: give one for each channel."
            )
        if not all(value > 0 for value in pair[1]):
            raise ValueError(f"std={std}: every value must be above zero.")
        return cls(*pair)

    def __str__(self) -> str:
        """Return mean and std in words."""
        return f"mean {_short(self.mean)}, std {_short(self.std)}"

    def undo(self, x: Tensor) -> Tensor:
        """Return the images ``[B, C, H, W]`` that gave this input, in its dtype."""
        mean, std = self._like(x)
        return x * std + mean

    def apply(self, images: Tensor) -> Tensor:
        """Return the input that these images ``[..., C, H, W]`` in [0, 1] give, in their dtype."""
        mean, std = self._like(images)
        return (images - mean) / std

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return mean, std


def declared(model: nn.Module) -> Preprocessing | None:
    """Return the preprocessing that a model carries in its configuration (timm's), if it does."""
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        if isinstance(config, dict) and config.get("mean") and config.get("std"):
            return Preprocessing(tuple(config["mean"]), tuple(config["std"]))
    return None


def mismatch(x: Tensor, wanted: Preprocessing) -> str:
    """Return a sentence if images ``[B, C, H, W]`` are not preprocessed as wanted, or nothing.

    An image in [0, 1] must come out when the preprocessing is undone, and use that range. Where it
    does not, the known preprocessings are tried, and the one that fits is named.
    """
    if x.dim() != 4 or x.shape[1] not in (
        len(wanted.mean),
        *((3,) if len(wanted.mean) == 1 else ()),
    ):
        return ""
    low, high = _range(x, wanted)
    outside = low < -0.03 or high > 1.03
    others = {
        words: Preprocessing(*pair)
        for words, pair in _KNOWN.items()
        if not _near(Preprocessing(*pair), wanted)
    }
    fitting = [words for words, other in others.items() if _fits(x, other)]
    squeezed = high - low < 0.75 and fitting
    if not outside and not squeezed:
        return ""
    guess = f" They look like images with {fitting[0]}." if fitting else ""
    return (
        f"The inputs do not fit the model's preprocessing ({wanted}): "
        f"undone, they span [{low:.2f}, {high:.2f}] instead of [0, 1].{guess} "
        "Preprocess as the model was trained, or pass mean= and std= if these inputs are meant."
    )


def _range(x: Tensor, wanted: Preprocessing) -> tuple[float, float]:
    images = wanted.undo(x.float())
    return float(images.min()), float(images.max())


def _fits(x: Tensor, other: Preprocessing) -> bool:
    """Whether images of the full range come out: nearly black and nearly white, nothing beyond."""
    low, high = _range(x, other)
    return -0.005 <= low <= 0.05 and 0.95 <= high <= 1.005


def _near(one: Preprocessing, other: Preprocessing) -> bool:
    pairs = zip(one.mean + one.std, other.mean + other.std, strict=False)
    return len(one.mean) == len(other.mean) and all(abs(a - b) < 0.02 for a, b in pairs)


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
