"""Linear layers with a trainable product of two thin matrices beside frozen weights."""

import math

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """A linear layer plus ``up @ down``, which is zero at first.

    Source: Hu et al., "LoRA", ICLR 2022.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        weight = base.weight
        self.down = nn.Parameter(torch.empty_like(weight[:1]).expand(rank, -1).clone())
        self.up = nn.Parameter(torch.zeros_like(weight[:, :1]).expand(-1, rank).clone())
        nn.init.normal_(self.down, std=1 / math.sqrt(base.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        y: Tensor = self.base(x) + x @ self.down.mT @ self.up.mT
        return y


def put_low_rank(module: nn.Module, rank: int) -> None:
    """Put a :class:`LowRank` in the place of every linear layer of a module."""
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Linear):
            module.set_submodule(name, LowRank(child, rank))
