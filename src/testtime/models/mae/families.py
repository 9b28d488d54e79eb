"""The families of checkpoints, told apart by the names in them, and the network of each."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

from testtime.models.mae.network import MAE, MAEClassifier
from testtime.models.mae.parts import Sizes

Tensors = dict[str, Tensor]

# What an entry is part of, by how its name begins; the first that fits.
_PARTS = {
    "cls_token": "encoder",
    "pos_embed": "encoder",
    "patch_embed.": "encoder",
    "blocks.": "encoder",
    "norm.": "norm",
    "mask_token": "pixels",
    "decoder_pred.": "pixels",
    "decoder_": "decoder",
    "rotation_head.": "turns",
    "classifier_": "vit-head",
    "bn.": "statistics",
    "head.0.": "probe",
    "head.1.": "probe",
    "head.": "linear",
    "fc_norm.": "mean",
}
HEAD = ("vit-head", "statistics", "linear")
_FAMILIES = {
    "encoder norm": "encoder",
    "encoder norm decoder pixels": "full",
    "encoder norm vit-head": "vit-probe",
    "encoder norm probe": "linear-probe",
    "encoder norm statistics linear": "linear-probe",  # as a network here has it
    "encoder norm decoder pixels vit-head": "ttt-vit",
    "encoder norm decoder pixels statistics linear": "ttt-linear",
    "encoder norm decoder turns": "rotation",
    "encoder norm decoder turns vit-head": "rotation",
    "encoder norm decoder turns statistics linear": "rotation",
    "encoder mean linear": "finetuned-mean",
    "encoder norm linear": "finetuned-token",
}
FAMILIES = (*dict.fromkeys(_FAMILIES.values()), "huggingface")
_OF_PARTS = {frozenset(parts.split()): family for parts, family in _FAMILIES.items()}

# A linear probe writes its head as a sequence of norm and layer.
_SEQUENCE = {"bn.": "head.0.", "head.": "head.1."}

# Heads of the published encoders, decoder and ViT-probing heads by width and depth. Not those of
# the small encoder: timm's is as wide and deep, with half its heads.
_PUBLISHED = {(768, 12): 12, (1024, 24): 16, (1280, 32): 16, (512, 8): 16}


def part_of(name: str) -> str | None:
    """Return the part of a network that an entry belongs to, or none that is known."""
    return next((part for start, part in _PARTS.items() if name.startswith(start)), None)


def parts_of(family: str) -> set[str]:
    """Return the parts that a network of a family may have."""
    return {part for held, name in _OF_PARTS.items() if name == family for part in held}


def family_of(names: Iterable[str]) -> str:
    """Return the family of a checkpoint by the names in it.

    Raises:
        ValueError: it is of none; the error says what was found and what was looked for.
    """
    names = list(names)
    if any(name.startswith(("vit.", "embeddings.")) for name in names):
        if "classifier.weight" in names:
            raise ValueError(
                "This is Hugging Face's ViTForImageClassification, a supervised ViT without a "
                "decoder, and no masked autoencoder. Load it with transformers."
            )
        return "huggingface"
    parts = {part_of(name) for name in names}
    family = _OF_PARTS.get(frozenset(part for part in parts if part))
    if family and None not in parts:
        return family
    odd = [name for name in names if part_of(name) is None] or names
    known = ", ".join(sorted(part for part in parts if part)) or "none"
    missing = [f"{mark}*" for mark, part in _PARTS.items() if part not in parts]
    raise ValueError(
        "This is no checkpoint of a masked autoencoder that is known here "
        f"({', '.join(FAMILIES)}). Found in {len(names)} entries: the parts {known}, and "
        f"{', '.join(odd[:4]) or 'nothing'}. Not found: {', '.join(missing)}."
    )


def to_sequence(state: Mapping[str, Tensor]) -> Tensors:
    """Return a linear head under the names of a linear probe."""
    return {_renamed(name, _SEQUENCE): tensor for name, tensor in state.items()}


def from_sequence(state: Mapping[str, Tensor]) -> Tensors:
    """Return a linear probe's head under the names of a linear head."""
    back = {there: here for here, there in _SEQUENCE.items()}
    return {_renamed(name, back): tensor for name, tensor in state.items()}


def build(
    state: Tensors,
    image: int | tuple[int, int] | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    classifier_heads: int | None = None,
) -> MAE | MAEClassifier:
    """Return a new network whose sizes the shapes of a checkpoint give.

    Args:
        state: under the authors' names.
        image: height and width; none: the patches are in a square.
        heads: attention heads of the encoder; none: as published for its width and depth.
        decoder_heads: of the decoder.
        classifier_heads: of a ViT-probing head.

    Raises:
        ValueError: an entry that gives a size is missing, or something is not in the shapes.
    """
    needed = ["cls_token", "pos_embed", "patch_embed.proj.weight"]
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"The checkpoint is torn: it lacks {missing}. Give a whole file.")
    channels, patch = state["patch_embed.proj.weight"].shape[1:3]
    encoder = _sizes(state, "", state["cls_token"].shape[2], heads, "heads")
    if image is None:
        image = _square(state["pos_embed"].shape[1] - 1) * patch
    parts = {part_of(name) for name in state}
    outputs = ("classifier_pred.weight", "head.weight", "rotation_head.weight")
    classes = next((state[name].shape[0] for name in outputs if name in state), 1000)
    if "linear" in parts and "statistics" not in parts:
        pool: Literal["mean", "token"] = "mean" if "mean" in parts else "token"
        return MAEClassifier(image, patch, encoder, pool, classes, channels)
    decoder: Sizes | None = None
    if "decoder_embed.weight" in state:
        width = state["decoder_embed.weight"].shape[0]
        decoder = _sizes(state, "decoder_", width, decoder_heads, "decoder_heads")
    head: Sizes | Literal["linear"] | None = "linear" if "linear" in parts else None
    if "classifier_embed.weight" in state:
        width = state["classifier_embed.weight"].shape[0]
        head = _sizes(state, "classifier_", width, classifier_heads, "classifier_heads")
    task: Literal["reconstruction", "rotation"]
    task = "rotation" if "turns" in parts else "reconstruction"
    return MAE(image, patch, encoder, decoder, head, classes, channels, task=task)


def _square(patches: int) -> int:
    side = math.isqrt(patches)
    if side**2 != patches:
        raise ValueError(
            f"{patches} patches are not in a square, and their grid is not in the file. Pass "
            "image=(height, width)."
        )
    return side


def _sizes(state: Tensors, prefix: str, dim: int, heads: int | None, option: str) -> Sizes:
    blocks = {found[1] for name in state if (found := re.match(rf"{prefix}blocks\.(\d+)\.", name))}
    heads = heads or _PUBLISHED.get((dim, len(blocks)))
    if heads is None:
        raise ValueError(
            f"The number of attention heads is not in a file, and none is published for "
            f"{len(blocks)} blocks of width {dim}. Pass {option}=."
        )
    return Sizes(dim, len(blocks), heads)


def _renamed(name: str, words: Mapping[str, str]) -> str:
    for here, there in words.items():
        if name.startswith(here):
            return there + name[len(here) :]
    return name
