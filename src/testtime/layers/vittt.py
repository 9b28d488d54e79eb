"""The ViT^3 layer: gated heads, a convolution over the grid, one inner step each."""

import torch
from torch import Tensor, nn

from testtime.layers.attention import check_heads, merge_heads, split_heads
from testtime.layers.record import Inner, Recorded
from testtime.ops.mttt import Dot, mttt
from testtime.ops.mttt.checks import check_grid


class ViTTT(Recorded):
    """Mixing by H gated learners and one convolution: ``[B, N, C] -> [B, N, C]``.

    Each takes one full-batch step at rate 1 on the dot product of its predictions from the keys
    with the values, and answers the queries. Tokens lie on a grid, row after row; any grid will do
    at any call. Parameters have the official names and layout.

    >>> y = ViTTT(192, 6)(torch.randn(8, 196, 192))

    Args:
        dim: C; a multiple of 4 where ``rope`` is on.
        num_heads: H gated heads of width C / H, which is the convolution's width too.
        qkv_bias: whether the projection of the tokens has a bias.
        rope: whether queries and keys of the gated heads are rotated by their place on the grid,
            over all C channels before the split into heads, as in H-ViT^3.

    Raises:
        ValueError: heads that do not divide the width, or a width that cannot be rotated.

    Source: Han et al., "ViT^3", arXiv 2512.01643. Scale 1/3, the squashing of inner gradients and
    the convolution beside H heads are the authors' code's.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = True, rope: bool = False
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if rope and dim % 4:
            raise ValueError(f"A width of {dim} cannot be rotated; choose a multiple of 4.")
        self.dim, self.num_heads, self.rope = dim, num_heads, rope
        width = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim + 3 * width, bias=qkv_bias)
        self.w1 = nn.Parameter(torch.empty(1, num_heads, width, width))
        self.w2 = nn.Parameter(torch.empty(1, num_heads, width, width))
        self.w3 = nn.Parameter(torch.empty(width, 1, 3, 3))
        self.proj = nn.Linear(dim + width, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the official initial values."""
        for w in (self.qkv.weight, self.w1, self.w2, self.w3, self.proj.weight):
            nn.init.trunc_normal_(w, std=0.02)
        for bias in (self.qkv.bias, self.proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Mix tokens ``[B, N, C]``.

        Args:
            x: tokens, normed by the block that hosts the layer.
            key_padding_mask: ``[B, N]``, true at padded tokens; the convolution sees zeros there.
            grid: rows and columns of the tokens; by default a square.

        Raises:
            ValueError: the grid does not hold the tokens.
        """
        grid = square_grid(x.shape[1]) if grid is None else grid
        check_grid(grid, x.shape[1])
        dim, width = self.dim, self.dim // self.num_heads
        q1, k1, v1, q2, k2, v2 = self.qkv(x).split([dim] * 3 + [width] * 3, -1)
        if self.rope:
            q1, k1 = rotate(q1, grid), rotate(k1, grid)
        recording = self.inner_record is not None
        gated, loss1, w12 = mttt(
            split_heads(q1, self.num_heads),
            split_heads(k1, self.num_heads),
            split_heads(v1, self.num_heads),
            {"weight_1": self.w1, "weight_2": self.w2},
            Dot(),
            learner="glu",
            key_padding_mask=key_padding_mask,
            losses=recording,
            state=self.inner_state,
        )
        convolved, loss2, w3 = mttt(
            q2[:, None],
            k2[:, None],
            v2[:, None],
            {"weight": self.w3.transpose(0, 1)},
            Dot(),
            learner="dwconv",
            grid=grid,
            key_padding_mask=key_padding_mask,
            losses=recording,
            state=self.inner_state,
        )
        if self.inner_record is not None and loss1 is not None and loss2 is not None:
            state = None
            if w12 is not None and w3 is not None:
                # [B d, 1, 3, 3], image first, as the authors' code has it.
                kernel = w3["weight"].reshape(-1, 1, 3, 3)
                state = {"w1": w12["weight_1"], "w2": w12["weight_2"], "w3": kernel}
            self.inner_record.append(Inner(torch.cat([loss1, loss2], 1), state))
        y: Tensor = self.proj(torch.cat([merge_heads(gated), convolved[:, 0]], -1))
        return y

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the official recipe does not decay: biases."""
        return {n for n, p in self.named_parameters() if p.dim() == 1}

    def flops(self, tokens: int) -> int:
        """Return a forward's FLOPs for one image; a multiply and an add are two."""
        d, p = self.dim, self.dim // self.num_heads
        return tokens * (8 * d * d + 8 * d * p + 12 * d * p + 36 * p)

    def extra_repr(self) -> str:
        """Show what is chosen."""
        return f"{self.dim}, {self.num_heads}, rope={self.rope}"


def square_grid(tokens: int) -> tuple[int, int]:
    """Return the square that holds the tokens.

    Raises:
        ValueError: there is none.
    """
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens make no square; give grid=(rows, columns).")
    return side, side


def rotations(grid: tuple[int, int], channels: int, device: torch.device | None = None) -> Tensor:
    """Return cosine and sine of each channel pair's angle, float64 ``[rows, columns, C / 2, 2]``.

    The first half of the pairs turns with the row, the other with the column, by 10000^(-4j/C).
    """
    j = torch.arange(channels // 4, dtype=torch.float64, device=device)
    frequency = 10000 ** (-j / len(j))
    rows, columns = (
        torch.arange(n, dtype=torch.float64, device=device)[:, None] * frequency for n in grid
    )
    angles = torch.cat(
        [rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)], -1
    )
    return torch.stack([angles.cos(), angles.sin()], -1)


def rotate(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return tokens ``[B, N, C]``, each pair of neighbouring channels turned by its place."""
    table = rotations(grid, x.shape[-1], x.device).flatten(0, 1)
    table = table.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = table.unbind(-1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
