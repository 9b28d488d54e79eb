"""Many tensors handled together: a launch for each would cost more than the work."""

from typing import Any

import torch
from torch import Tensor

# Tensors up to this many values are handled together.
_SMALL = 2**16


def few(tensors: list[Tensor]) -> list[Tensor]:
    """Return two-dimensional tensors, the small ones of a dtype joined along dimension 1."""
    groups: dict[Any, list[Tensor]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.dtype if tensor.numel() <= _SMALL else index, []).append(tensor)
    return [torch.cat(group, 1) for group in groups.values()]


def copy_where(where: Tensor, kept: list[Tensor], new: list[Tensor]) -> None:
    """Write ``new`` into ``kept`` where the boolean scalar holds, small tensors together."""
    groups: dict[Any, list[int]] = {}
    for index, tensor in enumerate(kept):
        groups.setdefault(tensor.dtype if tensor.numel() <= _SMALL else index, []).append(index)
    for places in groups.values():
        old, value = (torch.cat([t[i].reshape(-1) for i in places]) for t in (kept, new))
        sizes = [kept[i].numel() for i in places]
        parts = torch.split(torch.where(where, value, old), sizes)
        torch._foreach_copy_(
            [kept[i] for i in places],
            [part.view(kept[i].shape) for part, i in zip(parts, places, strict=True)],
        )
