"""The vision transformer that hosts MTTT, with any mixing layer."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testtime._suggest import suggest
from testtime.layers import ViTTT
from testtime.layers import mixer as build_mixer
from testtime.layers.official import Named, Official, same, transposed, within

# The published sizes; a head is 64 wide in both.
SIZES = {
    "tiny": {"dim": 192, "depth": 12, "num_heads": 3},
    "small": {"dim": 384, "depth": 12, "num_heads": 6},
}

# What the authors' code calls each mixing layer inside a block.
_PARTS = {
    "MTTT": "TTTLayer_0",
    "LinearAttention": "LinearAttention_0",
    "SoftmaxAttention": "MultiHeadDotProductAttention_0",
}


class ViT(nn.Module):
    """Pre-norm vision transformer: images ``[B, 3, H, W]`` to logits ``[B, num_classes]``.

    No class token: the mean over tokens, a dense layer with tanh, the head (which starts at zero).
    Patches of one pixel make every pixel a token.

    >>> logits = ViT("mttt-mlp", image_size=32, patch_size=4)(torch.rand(2, 3, 32, 32))

    Args:
        mixer: a name of ``testtime.layers.MIXERS``, or a function from (dim, num_heads) to a layer
            ``[B, N, C] -> [B, N, C]``.
        image_size: H and W, one number for both.
        patch_size: side of a patch.
        dim: width.
        depth: blocks.
        num_heads: of each mixing layer.
        mlp_dim: hidden width of the blocks' MLPs; by default four times the width.
        num_classes: logits.
        in_chans: channels of the images.
        pos_embed: ``"sincos2d"``, a fixed table, or ``"learn"``; by default the table, but learned
            where a token is a pixel, as published.
        mixer_args: further arguments of a mixer that is given by name.

    Raises:
        ValueError: patches that do not divide the image, a width that has no table, an unknown
            mixer.

    Source: arXiv 2310.13807, section 4, after Beyer et al., "Better plain ViT baselines", arXiv
    2205.01580. Parameters have timm's names; :func:`testtime.layers.from_official` takes the JAX
    code's.
    """

    pos_embed: Tensor

    def __init__(
        self,
        mixer: str | Callable[[int, int], nn.Module] = "mttt-mlp",
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_dim: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        pos_embed: str | None = None,
        mixer_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
        if patch_size < 1 or height % patch_size or width % patch_size:
            raise ValueError(
                f"Patches of {patch_size} do not divide an image of {height} x {width}; choose a "
                "patch_size that does."
            )
        if pos_embed is None:
            pos_embed = "learn" if patch_size == 1 else "sincos2d"
        if pos_embed not in ("sincos2d", "learn"):
            raise ValueError(f"pos_embed is '{pos_embed}'; choose 'sincos2d' or 'learn'.")
        self.image_size, self.patch_size = (height, width), patch_size
        self.grid = (height // patch_size, width // patch_size)
        self.patch_embed = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        if pos_embed == "learn":
            self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], dim))
        else:
            self.register_buffer("pos_embed", sincos2d(self.grid, dim), persistent=False)

        def make() -> nn.Module:
            if isinstance(mixer, str):
                return build_mixer(mixer, dim, num_heads, **(mixer_args or {}))
            return mixer(dim, num_heads)

        hidden = 4 * dim if mlp_dim is None else mlp_dim
        self.blocks = nn.ModuleList(Block(make(), dim, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pre_logits = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, num_classes)
        self.reset_parameters()

    @classmethod
    def sized(
        cls, size: str, mixer: str | Callable[[int, int], nn.Module] = "mttt-mlp", **changes: Any
    ) -> "ViT":
        """Return a published size, ``"tiny"`` or ``"small"``; ``changes`` as for the class.

        Raises:
            ValueError: there is no such size.
        """
        if size not in SIZES:
            raise ValueError(
                f"There is no size '{size}' (known: {', '.join(SIZES)}).{suggest(size, SIZES)}"
            )
        arguments: dict[str, Any] = {**SIZES[size], **changes}
        return cls(mixer, **arguments)

    def reset_parameters(self) -> None:
        """Draw the official initial values of all but the mixing layers, which draw their own."""
        for layer in (self.patch_embed, self.pre_logits):
            # LeCun's, cut off at two standard deviations of a normal that is wider by as much.
            std = layer.weight[0].numel() ** -0.5 / 0.87962566103423978
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.normal_(self.pos_embed, std=1 / math.sqrt(self.pos_embed.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits.

        Raises:
            ValueError: the images are not of ``image_size``, to which grid and table are tied.
        """
        if x.shape[-2:] != self.image_size:
            raise ValueError(
                f"The images are {[*x.shape[-2:]]} and the model is built for "
                f"{[*self.image_size]}; resize them, or build it with another image_size."
            )
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = x + self.pos_embed.to(x.dtype)
        for block in self.blocks:
            x = block(x, self.grid)
        x = self.norm(x).mean(1)
        logits: Tensor = self.head(self.pre_logits(x).tanh())
        return logits

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the official recipe does not decay: all but kernels."""
        spared = {n for n, _ in self.named_parameters() if n.endswith("bias") or n == "pos_embed"}
        for path, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                spared.add(f"{path}.weight")
            elif path and hasattr(module, "no_weight_decay"):
                spared |= {f"{path}.{name}" for name in module.no_weight_decay()}
        return spared

    def official(self) -> dict[str, Official]:
        """Return the official names of the parameters."""
        names = {
            "embedding/kernel": Official(
                "patch_embed.weight",
                lambda t: t.permute(2, 3, 1, 0),
                lambda t: t.permute(3, 2, 0, 1),
            ),
            "embedding/bias": same("patch_embed.bias"),
            **_norm("Transformer/encoder_norm", "norm"),
            **_dense("pre_logits", "pre_logits"),
            **_dense("head", "head"),
        }
        if isinstance(self.pos_embed, nn.Parameter):
            names["pos_embedding"] = same("pos_embed")
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            there, own = f"Transformer/encoderblock_{i}", f"blocks.{i}"
            part = _PARTS.get(type(block.attn).__name__)
            if part is None or not isinstance(block.attn, Named):
                raise TypeError(
                    f"{type(block.attn).__name__} has no parameter names in the authors' code."
                )
            names |= within(f"{there}/{part}", f"{own}.attn", block.attn.official())
            names |= _norm(f"{there}/LayerNorm_0", f"{own}.norm1")
            names |= _norm(f"{there}/LayerNorm_1", f"{own}.norm2")
            names |= _dense(f"{there}/MlpBlock_0/Dense_0", f"{own}.mlp.fc1")
            names |= _dense(f"{there}/MlpBlock_0/Dense_1", f"{own}.mlp.fc2")
        return names


class Block(nn.Module):
    """``x += attn(norm1(x)); x += mlp(norm2(x))``."""

    def __init__(self, attn: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.mlp = MLP(dim, hidden)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return tokens ``[B, N, C]``."""
        mixed = self.norm1(x)
        mixed = self.attn(mixed, grid=grid) if isinstance(self.attn, ViTTT) else self.attn(mixed)
        x = x + mixed
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class MLP(nn.Module):
    """Two dense layers with GELU, in its tanh form, between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens ``[B, N, C]``."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return y


def sincos2d(grid: tuple[int, int], dim: int) -> Tensor:
    """Return the fixed table of positions ``[1, N, C]``, computed in float64, rounded to float32.

    Sine and cosine of the column, then of the row, at 10000^(-j / (C / 4 - 1)).

    Raises:
        ValueError: the width is not a multiple of 4, or below 8.
    """
    if dim % 4 or dim < 8:
        raise ValueError(
            f"A width of {dim} has no table of positions; choose a multiple of 4, 8 at least."
        )
    j = torch.arange(dim // 4, dtype=torch.float64)
    frequency = 10000 ** (-j / (dim // 4 - 1))
    row, column = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij"
    )
    angles = [t.flatten()[:, None] * frequency for t in (column, row)]
    table = torch.cat([f for a in angles for f in (a.sin(), a.cos())], -1)
    return table.float()[None]


def _norm(there: str, own: str) -> dict[str, Official]:
    return {f"{there}/scale": same(f"{own}.weight"), f"{there}/bias": same(f"{own}.bias")}


def _dense(there: str, own: str) -> dict[str, Official]:
    return {f"{there}/kernel": transposed(f"{own}.weight"), f"{there}/bias": same(f"{own}.bias")}
