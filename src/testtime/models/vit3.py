"""The networks of ViT^3: plain, hierarchical, and the block for diffusion.

Source: Han et al., "ViT^3: Unlocking test-time training in vision", arXiv 2512.01643; parameters
have the names of the authors' code.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from testtime._suggest import suggest
from testtime.layers import ViTTT

Grid = tuple[int, int]

# The published networks; the stochastic depth is that of their training.
VIT3: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 192, "depth": 12, "num_heads": 6},
    "small": {"dim": 384, "depth": 12, "num_heads": 6, "drop_path": 0.1},
    "base": {"dim": 768, "depth": 12, "num_heads": 12, "drop_path": 0.4},
}
HVIT3: dict[str, dict[str, Any]] = {
    "tiny": {
        "dims": (64, 128, 320, 512),
        "depths": (1, 3, 9, 4),
        "num_heads": (2, 4, 10, 16),
        "drop_path": 0.2,
    },
    "small": {
        "dims": (64, 128, 320, 512),
        "depths": (2, 6, 18, 8),
        "num_heads": (2, 4, 10, 16),
        "drop_path": 0.4,
    },
    "base": {
        "dims": (96, 192, 448, 640),
        "depths": (2, 6, 18, 8),
        "num_heads": (3, 6, 14, 20),
        "drop_path": 0.6,
    },
}


class ViT3(nn.Module):
    """Plain ViT^3: images ``[B, 3, H, W]`` to logits; H and W any multiples of the patch.

    Args:
        dim: width.
        depth: blocks.
        num_heads: gated heads of each layer.
        patch_size: side of a patch.
        mlp_ratio: hidden width of the MLPs, in widths.
        num_classes: logits.
        in_chans: channels of the images.
        drop_path: stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 6,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_embed = _Patches(in_chans, dim, patch_size)
        rates = _rising(drop_path, depth)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, drop_path=r) for r in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.apply(_start)

    @classmethod
    def sized(cls, size: str, **changes: Any) -> "ViT3":
        """Return a published network: ``"tiny"``, ``"small"`` or ``"base"``."""
        return cls(**{**_known(size, VIT3), **changes})

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits."""
        x, grid = self.patch_embed(x)
        for block in self.blocks:
            x = block(x, grid)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class HViT3(nn.Module):
    """Hierarchical ViT^3: images ``[B, 3, H, W]`` to logits.

    A convolutional stem (a quarter of each side), four stages that halve the grid between them, a
    batch norm over images and tokens. Unlike the authors' code it takes any H and W.

    Args:
        dims: width of each stage, multiples of 4.
        depths: blocks of each stage.
        num_heads: gated heads of each stage.
        mlp_ratio: hidden width of the MLPs, in widths.
        num_classes: logits.
        in_chans: channels of the images.
        drop_path: stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: heads that do not divide a width, or a width that cannot be rotated.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (1, 3, 9, 4),
        num_heads: Sequence[int] = (2, 4, 10, 16),
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_embed = _Stem(in_chans, dims[0])
        rates = iter(_rising(drop_path, sum(depths)))
        self.layers = nn.ModuleList()
        for s, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            blocks = [
                Block(dim, heads, mlp_ratio, hierarchical=True, drop_path=next(rates))
                for _ in range(depth)
            ]
            self.layers.append(_Stage(blocks, dims[s + 1] if s + 1 < len(dims) else None))
        self.norm = nn.BatchNorm1d(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(_start)

    @classmethod
    def sized(cls, size: str, **changes: Any) -> "HViT3":
        """Return a published network: ``"tiny"``, ``"small"`` or ``"base"``."""
        return cls(**{**_known(size, HVIT3), **changes})

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits."""
        x, grid = self.patch_embed(x)
        for stage in self.layers:
            x, grid = stage(x, grid)
        x = self.norm(x.transpose(1, 2)).mean(2)
        logits: Tensor = self.head(x)
        return logits


class Block(nn.Module):
    """``u += cpe(u); u += attn(norm1(u)); u += mlp(norm2(u))`` on a grid of tokens.

    Args:
        dim: width.
        num_heads: gated heads.
        mlp_ratio: hidden width of the MLP, in widths.
        hierarchical: as in H-ViT^3: rotation, LayerNorms with PyTorch's eps, a depthwise
            convolution in the MLP.
        drop_path: probability that a branch is left out of an image in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        hierarchical: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        eps = 1e-5 if hierarchical else 1e-6
        self.drop_path = drop_path
        self.cpe = _depthwise(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = ViTTT(dim, num_heads, rope=hierarchical)
        self.mlp = MLP(dim, int(dim * mlp_ratio), convolves=hierarchical)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Return tokens ``[B, N, C]``."""
        x = x + on_grid(self.cpe, x, grid)
        x = x + self._drop(self.attn(self.norm1(x), grid=grid))
        return x + self._drop(self.mlp(self.norm2(x), grid))

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep


class DiTBlock(nn.Module):
    """The block of DiT^3: shift, scale and gate of both branches come from a condition.

    Args:
        dim: width.
        num_heads: gated heads.
        mlp_ratio: hidden width of the MLP, in widths.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.cpe = _depthwise(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = ViTTT(dim, num_heads)
        self.mlp = MLP(dim, int(dim * mlp_ratio), approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor, grid: Grid) -> Tensor:
        """Return tokens ``[B, N, C]`` under a condition ``[B, C]``."""
        s1, a1, g1, s2, a2, g2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + on_grid(self.cpe, x, grid)
        x = x + g1 * self.attn(self.norm1(x) * (1 + a1) + s1, grid=grid)
        y: Tensor = x + g2 * self.mlp(self.norm2(x) * (1 + a2) + s2, grid)
        return y


class MLP(nn.Module):
    """Two dense layers with GELU between; H-ViT^3 adds a depthwise convolution and a GELU."""

    def __init__(
        self, dim: int, hidden: int, convolves: bool = False, approximate: str = "none"
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwc = _depthwise(hidden) if convolves else None

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Return tokens ``[B, N, C]``."""
        x = F.gelu(self.fc1(x), approximate=self.approximate)
        if self.dwc is not None:
            x = F.gelu(x + on_grid(self.dwc, x, grid))
        y: Tensor = self.fc2(x)
        return y


class PatchMerging(nn.Module):
    """Between stages: ``[B, N, C]`` to half the grid and another width, by three convolutions."""

    def __init__(self, dim: int, dim_out: int, ratio: int = 4) -> None:
        super().__init__()
        hidden = ratio * dim_out
        self.conv = nn.Sequential(
            _Conv(dim, hidden, 1, bias=True, norm=False, act=True),
            _Conv(hidden, hidden, 3, stride=2, groups=hidden, bias=True, norm=False, act=True),
            _Conv(hidden, dim_out, 1, bias=True, norm=True, act=False),
        )

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Return the tokens and their grid."""
        return _tokens(self.conv(_image(x, grid)))


class _Stage(nn.Module):
    """Blocks on one grid, then the way to the next."""

    def __init__(self, blocks: list[Block], dim_out: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        dim = blocks[0].cpe.in_channels
        self.downsample = None if dim_out is None else PatchMerging(dim, dim_out)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        for block in self.blocks:
            x = block(x, grid)
        if self.downsample is not None:
            x, grid = self.downsample(x, grid)
        return x, grid


class _Patches(nn.Module):
    """One convolution whose stride is its side."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        return _tokens(self.proj(x))


class _Stem(nn.Module):
    """Five convolutions to a quarter of each side."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.conv = nn.Sequential(
            _Conv(in_chans, half, 3, stride=2, act=True),
            _Conv(half, half, 3, act=True),
            _Conv(half, half, 3, act=True),
            _Conv(half, 4 * dim, 3, stride=2, act=True),
            _Conv(4 * dim, dim, 1, act=False),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        return _tokens(self.conv(x))


class _Conv(nn.Module):
    def __init__(
        self,
        channels_in: int,
        channels: int,
        side: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels_in, channels, side, stride, side // 2, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(channels) if norm else None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return F.relu(x) if self.act else x


def on_grid(conv: nn.Module, x: Tensor, grid: Grid) -> Tensor:
    """Return what a convolution makes of tokens ``[B, N, C]`` on their grid."""
    return _tokens(conv(_image(x, grid)))[0]


def _image(x: Tensor, grid: Grid) -> Tensor:
    return x.mT.reshape(x.shape[0], x.shape[2], *grid)


def _tokens(image: Tensor) -> tuple[Tensor, Grid]:
    return image.flatten(2).mT, (image.shape[2], image.shape[3])


def _depthwise(dim: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


def _rising(last: float, count: int) -> list[float]:
    """Return that many rates, from 0 linearly to the last."""
    return [last * i / max(count - 1, 1) for i in range(count)]


def _start(module: nn.Module) -> None:
    """Dense layers start as officially; convolutions as PyTorch's, ViTTT's weights as its own."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _known(size: str, sizes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if size not in sizes:
        raise ValueError(
            f"There is no size '{size}' (known: {', '.join(sizes)}).{suggest(size, sizes)}"
        )
    return sizes[size]
