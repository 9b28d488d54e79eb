"""The views of contrastive learning, SimCLR (2002.05709)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.adaptation.views import colours


def contrastive(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return one view of images ``[B, 3, H, W]`` in [0, 1], as SimCLR makes them (2002.05709).

    Each image has draws of its own: a crop of 20% to 100% of the area in any place, resized; a
    flip; with probability 0.8 its colours jittered, with 0.2 gray. Brightness, contrast,
    saturation and hue change in this order, where torchvision draws one.
    """

    def uniform(low: float, high: float) -> Tensor:
        share = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
        return low + (high - low) * share

    area, ratio = uniform(0.2, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = ((area * r).sqrt().clamp(max=1) for r in (ratio, 1 / ratio))
    right, down = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    flip = (uniform(0, 1) < 0.5).to(x.dtype) * 2 - 1
    zero = torch.zeros_like(area)
    theta = torch.stack([width * flip, zero, right, zero, height, down], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, "bilinear", "border", align_corners=False).clamp(0, 1)

    factors = [uniform(0.6, 1.4)[:, None, None, None] for _ in range(3)]
    jittered = colours.saturation(
        colours.contrast(colours.brightness(x, factors[0]), factors[1]), factors[2]
    )
    jittered = colours.hue(jittered, uniform(-0.1, 0.1)[:, None, None, None])
    x = torch.where((uniform(0, 1) < 0.8)[:, None, None, None], jittered, x)
    return torch.where((uniform(0, 1) < 0.2)[:, None, None, None], colours.gray(x).expand_as(x), x)
