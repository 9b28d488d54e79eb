"""Masked autoencoders: networks, masks, targets, and every kind of checkpoint there is of them."""

from testtime.models.mae.checkpoints import (
    Checkpoint,
    load_mae,
    read_checkpoint,
    read_state,
    save_mae,
)
from testtime.models.mae.families import FAMILIES, family_of
from testtime.models.mae.masking import (
    Masking,
    keep_count,
    masked_loss,
    masking,
    patchify,
    targets,
    unpatchify,
)
from testtime.models.mae.network import MAE, Encoder, MAEClassifier, Reconstruction
from testtime.models.mae.parts import DECODER, ENCODERS, HEADS, Sizes
from testtime.models.mae.positions import resize_table, sincos_table

__all__ = [
    "DECODER",
    "ENCODERS",
    "FAMILIES",
    "HEADS",
    "MAE",
    "Checkpoint",
    "Encoder",
    "MAEClassifier",
    "Masking",
    "Reconstruction",
    "Sizes",
    "family_of",
    "keep_count",
    "load_mae",
    "masked_loss",
    "masking",
    "patchify",
    "read_checkpoint",
    "read_state",
    "resize_table",
    "save_mae",
    "sincos_table",
    "targets",
    "unpatchify",
]
