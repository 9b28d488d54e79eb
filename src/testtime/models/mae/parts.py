"""The parts of a vision transformer: sizes, attention, blocks, patches made tokens."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every LayerNorm here; Hugging Face's configuration says 1e-12, PyTorch 1e-5


@dataclass(frozen=True)
class Sizes:
    """The size of one transformer: width, number of blocks, attention heads.

    Raises:
        ValueError: the heads do not divide the width, or something is not positive.
    """

    dim: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        if min(self.dim, self.depth, self.heads) < 1 or self.dim % self.heads:
            raise ValueError(
                f"{self}: the heads must divide the width, and all three be positive. Change one."
            )


# The published encoders (S/16 of the TTT repository, B/16, L/16, H/14), decoder and heads.
ENCODERS = {
    "small": Sizes(384, 12, 12),
    "base": Sizes(768, 12, 12),
    "large": Sizes(1024, 24, 16),
    "huge": Sizes(1280, 32, 16),
}
DECODER = Sizes(512, 8, 16)
HEADS = {"base": Sizes(768, 12, 12), "small": Sizes(512, 8, 16)}


class Attention(nn.Module):
    """Self-attention with one fused layer for queries, keys and values, in that order."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[N, T, D]`` to tokens ``[N, T, D]``."""
        n, length, dim = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, dim)
        out: Tensor = self.proj(mixed)
        return out


class MLP(nn.Module):
    """Two linear layers, four times as wide inside, with an exact GELU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[N, T, D]`` to tokens ``[N, T, D]``."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A transformer block with the norms before attention and MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[N, T, D]`` to tokens ``[N, T, D]``."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    """A convolution whose kernel and stride are the patch."""

    def __init__(self, channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, C, H, W]`` to tokens ``[N, L, D]``, row by row."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


def stacked(sizes: Sizes) -> nn.Sequential:
    """Return the blocks of a transformer, one after another."""
    return nn.Sequential(*(Block(sizes.dim, sizes.heads) for _ in range(sizes.depth)))
