"""ViT^3's smooth bound on an inner gradient."""

import torch
from torch import Tensor


def squash(grads: dict[str, Tensor], dims: tuple[int, ...]) -> dict[str, Tensor]:
    """Return ``g / (1 + |g|)``, the norm over these dimensions; at zero it is the identity."""
    return {
        name: g / (1 + torch.linalg.vector_norm(g, dim=dims, keepdim=True))
        for name, g in grads.items()
    }
