"""Read a recording: a safetensors file whose header describes it as JSON."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = 1
DTYPES = {"float64": torch.float64, "float32": torch.float32}
_REQUIRED = object()


class Unreplayable(Exception):  # noqa: N818 - what it says of a file, not a fault of the tool
    """A file, or something in it, that this tool cannot replay; the message is a sentence."""


class Config:
    """Hyper-parameters by name; knows which of them nobody has asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self.unread = set(values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a hyper-parameter; one without a default must be there."""
        self.unread.discard(key)
        value = self._values.get(key, default)
        if value is _REQUIRED:
            raise Unreplayable(f"its config has no '{key}'")
        return value


class Recording:
    """One file. Whatever is read from it is marked, so that nothing can be passed over."""

    def __init__(self, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.system: str = meta["system"]
        self.kind: str = meta["kind"]
        self.preset: str = meta["preset"]
        self.dtype = DTYPES[meta["dtype"]]
        self.config = Config(meta["config"])
        self.network: dict[str, Any] = meta.get("network") or {}
        self.protocol: dict[str, Any] | str = meta.get("protocol") or {}
        self._tensors = tensors
        self._unread = set(tensors)

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor and mark it as read."""
        if name not in self._tensors:
            raise Unreplayable(f"it has no tensor '{name}'")
        self._unread.discard(name)
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def replace(self, name: str, value: Tensor) -> None:
        """Put a recorded tensor in the form that the library takes; it counts as unread."""
        self._tensors[name] = value
        self._unread.add(name)

    def under(self, prefix: str) -> list[str]:
        """Return the names below a path such as ``state/3``, without that path."""
        return [k[len(prefix) + 1 :] for k in self._tensors if k.startswith(f"{prefix}/")]

    def floating(self, group: str) -> list[Tensor]:
        """Return the floating tensors of a group, to measure them by; that reads none of them."""
        tensors = [t for k, t in self._tensors.items() if k.startswith(f"{group}/")]
        return [t for t in tensors if t.is_floating_point()]

    def steps(self) -> list[int]:
        """Return the numbers of the steps that have inputs."""
        return sorted({int(part) for k in self.under("in") if (part := k.split("/")[0]).isdigit()})

    @property
    def mode(self) -> str:
        """Return the word for how the stream was run: online, episodic, continual."""
        return self.protocol if isinstance(self.protocol, str) else self.protocol.get("mode", "")

    def resets(self) -> set[int]:
        """Return the steps before which somebody outside called ``reset()``."""
        if isinstance(self.protocol, str):
            return set(self.config.get("reset_before_steps", ()))
        return set(self.protocol.get("reset_before", ()))

    def ignore(self, pattern: str) -> None:
        """Mark the tensors whose whole name matches: there is a reason not to compare them."""
        self._unread -= {k for k in self._unread if re.fullmatch(pattern, k)}

    def unread(self) -> list[str]:
        """Return the names of the tensors that nobody has read."""
        return sorted(self._unread)


def read(path: str | Path) -> Recording:
    """Return the recording in a file.

    Raises:
        Unreplayable: it is missing, torn, or not a recording of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise Unreplayable(f"it cannot be read ({error})") from error
    try:
        meta = json.loads(header["recording"])
        found = meta["format"]
    except (KeyError, TypeError, ValueError):
        raise Unreplayable(
            "its header describes no recording (a key 'recording' with JSON, which has a 'format')"
        ) from None
    if found != FORMAT:
        raise Unreplayable(f"its format is {found!r}, and only {FORMAT} is known")
    try:
        return Recording(meta, tensors)
    except (KeyError, TypeError) as error:
        raise Unreplayable(f"its description lacks or misspells something ({error!r})") from None
