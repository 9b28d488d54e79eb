"""The state as tensors, with the identity of what it belongs to; one safetensors file."""

import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from testtime.adaptation.core import Method
from testtime.adaptation.learner import Learner
from testtime.adaptation.optim import Tensors

FORMAT = 2
_KEPT = ("buffers.", "memory.", "generator")  # of the start; its slots are zeros


def pack(learner: Learner) -> Tensors:
    """Return everything that is needed to go on elsewhere, and whose it is."""
    start = {k: t for k, t in learner.start.tensors().items() if k.startswith(_KEPT)}
    identity = {
        "format": FORMAT,
        "batch": learner.state.batch,
        "begun": learner.state.begun,
        "seen": learner.state.seen,
        "classes": learner.classes,
        "couples": learner.couples,
        "method": _method(learner),
        "model": _fingerprint(learner),
    }
    packed = {f"state.{k}": t.clone() for k, t in learner.state.tensors().items()}
    packed |= {f"start.{k}": t.clone() for k, t in start.items()}
    # The start's weights are the model's, which is fingerprinted, unless source data moved them.
    theirs = {p.data_ptr() for p in learner.original.parameters()}
    moved = {k: w for k, w in learner.start.weights.items() if w.data_ptr() not in theirs}
    packed |= {f"start.weights.{k}": w.clone() for k, w in moved.items()}
    packed |= {f"constants.{k}": t.clone() for k, t in learner.constants.items()}
    packed |= {f"window.{k}": t.clone() for k, t in learner.state.window.items()}
    packed["identity"] = _encode(identity)
    return packed


def pack_source(learner: Learner) -> Tensors:
    """Return what the method computed from source data, and from whose model.

    Raises:
        ValueError: it computed nothing.
    """
    if not learner.constants:
        raise ValueError(
            f"{type(learner.method).__name__} has computed nothing from source data. Pass source= "
            "to adapt() with a method that uses it."
        )
    identity = {
        "format": FORMAT,
        "method": _method(learner),
        "model": _fingerprint(learner),
    }
    own = dict(learner.module.named_buffers())
    moved = {k: b for k, b in learner.start.buffers.items() if not torch.equal(b, own[k])}
    packed = {f"constants.{k}": t.clone() for k, t in learner.constants.items()}
    packed |= {f"buffers.{k}": b.clone() for k, b in moved.items()}
    packed["source"] = _encode(identity)
    return packed


def load_source(learner: Learner, path: str | PathLike[str]) -> None:
    """Give a learner what was computed from source data before; other hyper-parameters are told.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no such statistics, or those of another model or method.
    """
    packed = load(path)
    if "source" not in packed:
        raise ValueError(
            f"{path} holds no statistics of source data (it holds {sorted(packed)[:3]} ...). "
            "Use a file that Adapted.save_source() wrote."
        )
    identity = _decode(packed["source"])
    _check_format(identity)
    saved, mine = identity["method"], _method(learner)
    if saved["method"] != mine["method"]:
        raise ValueError(
            f"{path} holds the statistics of {saved['method']}, but the method is "
            f"{mine['method']}. Compute them anew: source= with batches, then save_source()."
        )
    _check_model(learner, identity, f"The statistics in {path}")
    common = {field.name for field in fields(Method)}
    differing = [k for k in _differing(saved, mine) if k not in common]
    if differing:
        words = "; ".join(f"{k} was {saved.get(k)} and is {mine.get(k)}" for k in differing)
        learner.say(f"The source statistics were computed with other settings: {words}.")
    learner.take_constants(_under("constants", packed), _under("buffers", packed))


@torch.inference_mode(False)  # what is loaded becomes state, and must stay writable
def unpack(learner: Learner, packed: Mapping[str, Any]) -> None:
    """Check that a state belongs to this model and method, then write it.

    Raises:
        ValueError: it does not; the message names what differs, and nothing has changed.
    """
    try:
        identity = _decode(packed["identity"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"This is no state of an adapted model (it holds {sorted(packed)[:3]} ...). "
            "Load what Adapted.save() or Adapted.state_dict() gave."
        ) from error
    _compare(learner, identity)
    memory = {
        place: {
            k: t.to(learner.device, copy=True) for k, t in _under(f"{place}.memory", packed).items()
        }
        for place in ("state", "start")
    }
    held = {f"state.{k}": t for k, t in learner.state.tensors().items()}
    held |= {f"start.{k}": t for k, t in learner.start.tensors().items() if k.startswith(_KEPT)}
    held = {k: t for k, t in held.items() if not k.startswith(("state.memory.", "start.memory."))}
    wrong = [
        k
        for k, t in held.items()
        if k not in packed or (packed[k].shape, packed[k].dtype) != (t.shape, t.dtype)
    ]
    wrong += sorted(f"start.memory.{k}" for k in memory["state"].keys() ^ memory["start"].keys())
    if wrong:
        raise ValueError(
            f"The state does not fit this adapted model: '{wrong[0]}' is missing or of another "
            "shape or dtype. Build the model and the method as they were when it was saved."
        )
    learner.state.begun = learner.start.begun = bool(identity["begun"])
    learner.classes, learner.couples = identity["classes"], identity["couples"]
    learner.start.weights |= {
        k: packed[f"start.weights.{k}"].to(learner.device, copy=True)
        for k in learner.start.weights
        if f"start.weights.{k}" in packed
    }
    learner.constants, learner.state.window = (
        {k: t.to(learner.device, copy=True) for k, t in _under(place, packed).items()}
        for place in ("constants", "window")
    )
    learner.state.seen = int(identity["seen"])
    learner.state.memory, learner.start.memory = memory["state"], memory["start"]
    learner.start.buffers = {
        k: packed[f"start.buffers.{k}"].to(learner.device, copy=True) for k in learner.start.buffers
    }
    for path, tensor in learner.state.tensors().items():
        if path != "generator":
            tensor.copy_(packed[f"state.{path}"])
    for place, state in (("state", learner.state), ("start", learner.start)):
        state.generator = packed[f"{place}.generator"].cpu().clone()
    learner.generator.set_state(learner.state.generator)
    learner.state.batch = int(identity["batch"])


def save(packed: Tensors, path: str | PathLike[str]) -> None:
    """Write tensors to a file, whole or not at all."""
    target, name = Path(path).resolve(), ""
    if target.exists() and not target.is_file():
        raise OSError(f"{target} is no regular file. Name a file to write the state to.")
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        save_file({k: t.contiguous() for k, t in packed.items()}, name)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's own mode would shut others out
        os.replace(name, target)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The state could not be written to {target}: {error}. "
            "What was there before is unchanged; free some space or choose another folder."
        ) from error
    finally:
        if name:
            Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load(path: str | PathLike[str]) -> Tensors:
    """Read tensors from a file.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no safetensors file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}. Give the path that save() wrote to.")
    try:
        tensors: Tensors = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as a safetensors file ({error}). "
            "It is torn or of another kind; use a file that Adapted.save() wrote."
        ) from error
    return tensors


def _fingerprint(learner: Learner) -> dict[str, str]:
    """Return a short hash of every tensor of the user's model, and of what the method added."""
    tensors = {**learner.module.state_dict(), **learner.original.state_dict()}
    return {k: _hash(t) for k, t in tensors.items() if isinstance(t, Tensor)}


def _compare(learner: Learner, identity: dict[str, Any]) -> None:
    _check_format(identity)
    saved, mine = identity["method"], _method(learner)
    differing = _differing(saved, mine)
    if differing:
        words = "; ".join(f"{k} was {saved.get(k)} and is {mine.get(k)}" for k in differing)
        raise ValueError(
            f"The state belongs to another method: {words}. Adapt with the method that saved it."
        )
    _check_model(learner, identity, "The state")


def _check_format(identity: dict[str, Any]) -> None:
    if identity.get("format") != FORMAT:
        raise ValueError(
            f"The file has format {identity.get('format')}, this version reads {FORMAT}. "
            "Load it with the version of testtime that saved it."
        )


def _check_model(learner: Learner, identity: dict[str, Any], what: str) -> None:
    saved, mine = identity["model"], _fingerprint(learner)
    differing = _differing(saved, mine)
    if differing:
        raise ValueError(
            f"{what} belongs to another model: {len(differing)} of {len(mine)} tensors differ, "
            f"first '{differing[0]}'. Load the weights that it was made with first."
        )


def _under(place: str, packed: Mapping[str, Any]) -> Tensors:
    prefix = f"{place}."
    return {k.removeprefix(prefix): t for k, t in packed.items() if k.startswith(prefix)}


def _encode(identity: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(identity).encode()), dtype=torch.uint8)


def _decode(encoded: Tensor) -> dict[str, Any]:
    identity: dict[str, Any] = json.loads(bytes(encoded.tolist()).decode())
    return identity


def _method(learner: Learner) -> dict[str, str]:
    return {"method": learner.method.name, **learner.method.configuration()}


def _differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [k for k in {**one, **other} if one.get(k) != other.get(k)]


def _hash(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype}{list(data.shape)}".encode())
    size = data.numel() * data.element_size()
    if size:
        digest.update((ctypes.c_char * size).from_address(data.data_ptr()))
    return digest.hexdigest()[:16]
