"""Checkpoints of masked autoencoders: told apart, read, joined, and written back.

=================== ================================================================================
family              files
=================== ================================================================================
``encoder``         ``mae_pretrain_vit_*.pth``; timm's ``vit_*.mae`` have the same names
``full``            ``mae_pretrain_vit_*_full.pth`` (normalised pixels), ``mae_visualize_vit_*.pth``
                    (plain pixels, also those with GAN loss): names and shapes are the same
``vit-probe``       ``prob_*.pth``: encoder and ViT-probing head
``linear-probe``    encoder and linear head, as MAE's linear probing writes it
``ttt-vit``         encoder, decoder and ViT-probing head
``ttt-linear``      encoder, decoder and linear head; own pre-training of the TTT repository
``rotation``        encoder, decoder without pixels, and a head or none
``finetuned-mean``  ``mae_finetuned_vit_*.pth``: mean of the patch tokens
``finetuned-token`` the same with the class token; timm's token-pooled ViTs have the same names
``huggingface``     ``facebook/vit-mae-*``, in any of three spellings, and ViTMAEModel
=================== ================================================================================

The authors' files are pickled dicts with the weights under ``model``.
"""

import argparse
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from testtime.models.mae.families import (
    FAMILIES,
    HEAD,
    Tensors,
    build,
    family_of,
    from_sequence,
    part_of,
    parts_of,
    to_sequence,
)
from testtime.models.mae.huggingface import (
    config_of,
    from_huggingface,
    spelling_of,
    to_huggingface,
)
from testtime.models.mae.network import MAE, MAEClassifier
from testtime.models.mae.pixels import require_target


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, under the names of :class:`MAE` and :class:`MAEClassifier`.

    Args:
        family: one of ``FAMILIES``.
        state: tensors by the authors' names.
        normalised: what is declared of the decoder's target; none: nothing.
        heads: attention heads of the encoder, where declared.
        decoder_heads: of the decoder, where declared.
        image: height and width, where declared.
        spelling: of Hugging Face's names, where it came in them.
    """

    family: str
    state: Tensors
    normalised: bool | None = None
    heads: int | None = None
    decoder_heads: int | None = None
    image: int | tuple[int, int] | None = None
    spelling: str | None = None

    def as_written(self) -> Tensors:
        """Return the tensors under the names that the family is written in."""
        if self.spelling:
            return to_huggingface(self.state, self.spelling)
        return to_sequence(self.state) if self.family == "linear-probe" else self.state


def read_state(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Return the checkpoint in a mapping from names to tensors.

    Args:
        state: under the authors' names or Hugging Face's.
        config: what is declared beside it, as Hugging Face's configurations call it:
            ``norm_pix_loss``, ``num_attention_heads``, ``decoder_num_attention_heads``,
            ``image_size``.

    Raises:
        ValueError: it is of no known family.
    """
    family, spelling, named = family_of(state), None, dict(state)
    if family == "huggingface":
        if any(name.startswith("embeddings.") for name in named):  # ViTMAEModel alone
            named = {f"vit.{name}": tensor for name, tensor in named.items()}
        spelling = spelling_of(list(named))
        named = from_huggingface(named)
    elif family == "linear-probe":
        named = from_sequence(named)
    config = config or {}
    size = config.get("image_size")
    return Checkpoint(
        family,
        named,
        config.get("norm_pix_loss"),
        config.get("num_attention_heads"),
        config.get("decoder_num_attention_heads"),
        size if size is None or isinstance(size, int) else (size[0], size[1]),
        spelling,
    )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Return what a file holds: the authors' ``.pth``, ``.safetensors``, or Hugging Face's folder.

    No code in a pickled file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is of no known family.
    """
    path, config = Path(path), {}
    if path.is_dir():
        if (path / "config.json").is_file():
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        path = next((file for file in files if file.is_file()), files[0])
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}. Give a checkpoint, or a folder that save_pretrained() wrote."
        )
    state, declared = _read_tensors(path)
    return read_state(state, config | declared)


def load_mae(
    path: str | Path | Checkpoint,
    *,
    probe: str | Path | Checkpoint | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    classifier_heads: int | None = None,
    normalised: bool | None = None,
    image: int | tuple[int, int] | None = None,
) -> MAE | MAEClassifier:
    """Return the network of a checkpoint with its weights, in eval mode.

    The network of the paper, from the two files that its authors use::

        load_mae("mae_pretrain_vit_large_full.pth", probe="prob_lr1e-3_wd.2_blk12_ep20.pth")

    Args:
        path: a file, a folder of Hugging Face's, or what :func:`read_checkpoint` returned.
        probe: a second one, whose head is added; its encoder must be the first one's.
        heads: attention heads of the encoder, which shapes do not give; none: as declared, or
            published for that width and depth.
        decoder_heads: of the decoder.
        classifier_heads: of a ViT-probing head.
        normalised: was the decoder trained on pixels normalised patch by patch, or on plain ones?
            None: what is declared beside the weights, else what its predictions show.
        image: height and width, where patches are not in a square.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of no known family; a number of heads or the target cannot be told; the
            declared target is the wrong one; the probe belongs to another encoder.
    """
    held = path if isinstance(path, Checkpoint) else read_checkpoint(path)
    state = dict(held.state)
    if probe is not None:
        head = probe if isinstance(probe, Checkpoint) else read_checkpoint(probe)
        state |= _head_of(head, state)
    with torch.device("meta"):  # its parameters come from the file: none are drawn
        network = build(
            state,
            image or held.image,
            heads or held.heads,
            decoder_heads or held.decoder_heads,
            classifier_heads,
        )
    if isinstance(network, MAE) and network.head_sizes == "linear":
        # The authors join the files of decoder and head without this count.
        state.setdefault("bn.num_batches_tracked", torch.zeros((), dtype=torch.int64))
    try:
        network.load_state_dict({k: t.clone() for k, t in state.items()}, assign=True)
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[1:])
        raise ValueError(
            f"The parts of this checkpoint do not fit each other: {lines[:400]} Give a whole file, "
            "and decoder and head of this encoder."
        ) from error
    network.eval()
    if isinstance(network, MAE) and network.decoder and network.task == "reconstruction":
        declared = held.normalised if normalised is None else normalised
        network.normalised = require_target(network, declared)
    return network


def save_mae(
    model: MAE | MAEClassifier,
    path: str | Path,
    family: str | None = None,
    spelling: Literal["hub", "memory", "saved"] = "hub",
) -> None:
    """Write a network as a checkpoint of a family.

    Args:
        model: the network; parts that the family has not are left out.
        path: ``.pth`` (the authors' dict with an entry ``model``), ``.safetensors``, or for
            ``"huggingface"`` a folder.
        family: one of ``FAMILIES``; none: that of the network's parts.
        spelling: of Hugging Face's names.

    Raises:
        ValueError: there is no such family, the network lacks a part of it, or Hugging Face has no
            place for the network.
    """
    state, path = model.state_dict(), Path(path)
    own = family_of(state)
    family = family or own
    if family == "huggingface":
        config = config_of(model)
        kept = {k: t for k, t in state.items() if part_of(k) not in HEAD}
        path.mkdir(parents=True, exist_ok=True)
        save_file(_plain(to_huggingface(kept, spelling)), path / "model.safetensors", _FORMAT)
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return
    parts = parts_of(family)
    kept = {name: tensor for name, tensor in state.items() if part_of(name) in parts}
    if family == "linear-probe":
        kept = to_sequence(kept)
    if family not in FAMILIES or family_of(kept) != family:
        raise ValueError(
            f"A network of the family '{own}' cannot be written as '{family}': it lacks a part of "
            f"it, or there is no such family (known: {', '.join(FAMILIES)})."
        )
    known = getattr(model, "normalised", None)
    declared = {} if known is None or "pixels" not in parts else {"norm_pix_loss": known}
    if path.suffix == ".safetensors":
        save_file(_plain(kept), path, _FORMAT | {k: json.dumps(v) for k, v in declared.items()})
    else:
        torch.save({"model": _plain(kept), **declared}, path)


_FORMAT = {"format": "pt"}


def _plain(state: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Return tensors by name, and what the file itself declares of the target."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                note = (file.metadata() or {}).get("norm_pix_loss")
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return state, {} if note is None else {"norm_pix_loss": json.loads(note)}
        # Training checkpoints carry the script's arguments; nothing else of theirs is let in.
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({_first_line(error)}). Give a whole file of weights."
        ) from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is no such file, and is not opened "
            f"({_first_line(error)}). Save its weights alone."
        ) from error
    state = held.get("model", held) if isinstance(held, dict) else held
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        found = ", ".join(map(str, held)) if isinstance(held, dict) else type(held).__name__
        raise ValueError(
            f"{path} holds no weights: looked for a dict of tensors, alone or under 'model', and "
            f"found {found}. Give a checkpoint."
        )
    beside = held if "model" in held else {}
    arguments = vars(beside["args"]) if "args" in beside else beside
    declared = arguments.get("norm_pix_loss")
    return state, {} if declared is None else {"norm_pix_loss": bool(declared)}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _head_of(probe: Checkpoint, state: Tensors) -> Tensors:
    """Return the head in a probing file, if it was trained on this encoder."""
    head = {name: tensor for name, tensor in probe.state.items() if part_of(name) in HEAD}
    if not head or probe.family.startswith("finetuned"):
        raise ValueError(
            f"A probe brings the head of a frozen encoder, but a file of the family "
            f"'{probe.family}' was given. Give one of the family vit-probe or linear-probe."
        )
    for name, there in probe.state.items():
        here = state.get(name)
        if here is None or name in head:
            continue
        off = (here.float() - there.float()).norm() if here.shape == there.shape else None
        if off is None or bool(off > 1e-2 * there.float().norm()):  # files may be rounded
            raise ValueError(
                f"The probing head was trained on another encoder: {name} differs. The published "
                "head belongs to mae_pretrain_vit_large_full.pth (normalised pixels) and to no "
                "visualisation file. Give the head of this encoder."
            )
    return head
