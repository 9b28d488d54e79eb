"""The attention that MTTT is measured against, with the authors' parametrisation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testtime.layers.official import Official, into_width, out_of_heads, same, split, transposed


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention, scaled by 1/sqrt(C/H): ``[B, N, C] -> [B, N, C]``.

    Args:
        dim: C.
        num_heads: H.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        _xavier(self)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Mix tokens ``[B, N, C]``; the mask ``[B, N]`` is true at padded tokens."""
        q, k, v = (split_heads(f(x), self.num_heads) for f in (self.query, self.key, self.value))
        mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
        y: Tensor = self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
        return y

    def flops(self, tokens: int) -> int:
        """Return a forward's FLOPs for one image."""
        return 8 * tokens * self.dim**2 + 4 * tokens**2 * self.dim

    def official(self) -> dict[str, Official]:
        """Return the official names of the parameters."""
        heads = self.num_heads
        names = {"out/kernel": out_of_heads("out.weight", heads), "out/bias": same("out.bias")}
        for part in ("query", "key", "value"):
            names[f"{part}/kernel"] = into_width(f"{part}.weight", heads)
            names[f"{part}/bias"] = split(f"{part}.bias", heads)
        return names


class LinearAttention(nn.Module):
    """Multi-head linear attention without softmax: ``[B, N, C] -> [B, N, C]``.

    Map and divisor are computed in float32 at least: elu + 1 reaches zero early in half precision.

    Args:
        dim: C.
        num_heads: H.
        feature_map: of queries and keys: ``"identity"`` or ``"elu"`` (elu + 1).
        normalizer: ``"constant"`` divides by n C / H, ``"adaptive"`` by ``q . sum k`` (no epsilon,
            as in the authors' code).

    Raises:
        ValueError: heads that do not divide the width, an unknown map or normaliser.

    Source: Katharopoulos et al., "Transformers are RNNs", ICML 2020; the identity map and the
    constant divisor are arXiv 2310.13807's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feature_map: str = "identity",
        normalizer: str = "constant",
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if feature_map not in ("identity", "elu") or normalizer not in ("constant", "adaptive"):
            raise ValueError(
                f"feature_map is '{feature_map}' and normalizer '{normalizer}'; choose 'identity' "
                "or 'elu', and 'constant' or 'adaptive'."
            )
        self.dim, self.num_heads = dim, num_heads
        self.feature_map, self.normalizer = feature_map, normalizer
        self.query, self.key, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        _xavier(self)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Mix tokens ``[B, N, C]``; the mask ``[B, N]`` is true at padded tokens."""
        q, k, v = (split_heads(f(x), self.num_heads) for f in (self.query, self.key, self.value))
        dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
        count: int | Tensor = x.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = q.to(wide), k.to(wide), v.to(wide)
            if self.feature_map == "elu":
                q, k = F.elu(q) + 1, F.elu(k) + 1
            if key_padding_mask is not None:
                keep = ~key_padding_mask
                k = torch.where(keep[:, None, :, None], k, 0)
                v = torch.where(keep[:, None, :, None], v, 0)
                count = keep.sum(1).clamp(min=1).view(-1, 1, 1, 1)
            if self.normalizer == "constant":
                o = q @ (k.mT @ v / (count * q.shape[-1]))
            else:
                o = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1))
        y: Tensor = self.proj(merge_heads(o.to(dtype)))
        return y

    def flops(self, tokens: int) -> int:
        """Return a forward's FLOPs for one image."""
        return 8 * tokens * self.dim**2 + 4 * tokens * self.dim**2 // self.num_heads

    def official(self) -> dict[str, Official]:
        """Return the official names of the parameters."""
        names = {}
        for part in ("query", "key", "value", "proj"):
            names[f"{part}/kernel"] = transposed(f"{part}.weight")
            names[f"{part}/bias"] = same(f"{part}.bias")
        return names

    def extra_repr(self) -> str:
        """Show what is chosen."""
        return f"feature_map={self.feature_map}, normalizer={self.normalizer}"


def check_heads(dim: int, num_heads: int) -> None:
    """Refuse heads that do not divide the width."""
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(
            f"{num_heads} heads do not divide a width of {dim}; choose num_heads that does."
        )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return [B, H, N, P] of [B, N, H P]."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Return [B, N, H P] of [B, H, N, P]."""
    return x.transpose(1, 2).flatten(2)


def _xavier(module: nn.Module) -> None:
    for layer in module.children():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
