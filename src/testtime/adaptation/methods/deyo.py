"""DeYO: entropy minimization on predictions that fall when the object's shape is destroyed.

Paper: Lee, Jung, Lee, Park, Shin, Hwang, Yoon, ICLR 2024, arXiv 2403.07366.
Code that was recorded: Jhyun17/DeYO.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from testtime.adaptation import views
from testtime.adaptation.calls import describe
from testtime.adaptation.core import Draw, Net, Objective
from testtime.adaptation.methods._norm import LowerEntropyMethod
from testtime.adaptation.objectives import mean_where
from testtime.adaptation.optim import SGD, Adam, Tensors


@dataclass(frozen=True)
class DeYO(LowerEntropyMethod):
    """Descend the entropy of sure predictions that rest on shape and not on texture alone.

    With ``H_i`` the entropy of prediction ``i``, ``y_i`` its class, and ``x'`` the image with its
    shape destroyed, by shuffled patches::

        PLPD_i = p(y_i | x_i) - p(y_i | x'_i)
        keep = {i: H_i < margin ln C and PLPD_i > plpd}
        loss = <(exp(weight_margin ln C - H_i) + exp(PLPD_i)) H_i>_keep

    with no gradient through the weights. Where rows couple (BatchNorm) the destroyed images of the
    sure predictions go forward alone, which takes one look from the host; elsewhere all do. With an
    empty ``keep`` nothing changes, momentum included. The answer is from before the update. State:
    the optimiser's, and the random generator.

    Fails where textures are the classes, under heavy shifts (no prediction passes), and with small
    batches under BatchNorm.

    Changed from the official code: dropout and the like stay off, every kind of norm layer adapts,
    a reset exists, an entropy filter that is off passes all (the code: ``H <= ln 1000``). Presets:
    ``official`` is the code for ImageNet-C, wild; ``mild`` its other threshold; ``vit`` the rate
    for vision transformers, batches of 64. Below that (ResNet: below 32) scale it with the batch.

    Args:
        margin: the entropy from which on a prediction is not sure, as a share of ``ln C``; none:
            all are.
        weight_margin: of the weight, as a share of ``ln C``.
        plpd: what the probability of its class must fall by; none: nothing.
        weights: which parts the weight has: of ``"entropy"`` and ``"plpd"``; empty: it is one.
        destroy: shuffle ``"patch"``es of each image or the ``"pixel"``s of all alike, or ``"occ"``:
            put the mean colour into a window.
        patches: so many along each side; where that does not divide it, the image is resized.
        window: side, first row and first column of the window; none: the middle half each way.
    """

    optimizer: SGD | Adam | None = SGD(lr=0.00025, momentum=0.9)
    margin: float | None = 0.5
    weight_margin: float = 0.4
    plpd: float | None = 0.2
    weights: tuple[str, ...] = ("entropy", "plpd")
    destroy: Literal["patch", "pixel", "occ"] = "patch"
    patches: int = 4
    window: tuple[int, int, int] | None = None

    cost = (2, 1)
    looks = 1
    presets = {  # noqa: RUF012
        "official": {"layers": (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm), "train": True},
        "mild": {"plpd": 0.3},
        "vit": {"optimizer": SGD(lr=0.001, momentum=0.9)},
    }

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        super().__post_init__()
        if self.destroy not in ("patch", "pixel", "occ"):
            raise ValueError(
                f"DeYO(destroy={self.destroy!r}) is not known: use 'patch', 'pixel' or 'occ'."
            )
        if unknown := set(self.weights) - {"entropy", "plpd"}:
            raise ValueError(
                f"DeYO(weights=...) names {sorted(unknown)}: use 'entropy' and 'plpd'."
            )
        if self.patches < 2:
            raise ValueError(f"DeYO(patches={self.patches}): shuffling needs at least 2 a side.")

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """Refuse what has no shape to destroy; there is no memory."""
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(
                f"DeYO destroys the shapes in images [B, C, H, W], but the input is {describe(x)}. "
                "Use a method without augmentations for such data, such as ETA."
            )
        if self.destroy == "patch" and min(x.shape[-2:]) < self.patches:
            raise ValueError(
                f"DeYO(patches={self.patches}) cannot cut images of {x.shape[-2]} x {x.shape[-1]} "
                "pixels into so many patches a side. Choose fewer."
            )
        return {}

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the weighted mean entropy of what is kept, and all logits."""
        logits = self.predict(net, x, memory)
        if logits.dim() != 2:
            raise ValueError(
                f"DeYO compares one prediction an image, but the logits are {describe(logits)}. "
                "Use Tent or ETA, which take dense logits."
            )
        entropies, scale = self.entropy(logits), math.log(logits.shape[1])
        sure = entropies < (math.inf if self.margin is None else self.margin * scale)

        destroyed = self.destroyed(x, draw)
        still = net.at({k: w.detach() for k, w in net.weights.items()})
        if net.couples:  # batch statistics see who is there
            fallen = torch.zeros_like(logits)
            if sure.any():
                fallen[sure] = self.predict(still, destroyed[sure], memory)
        else:
            fallen = self.predict(still, destroyed, memory)
        probs, label = logits.detach().softmax(1), logits.argmax(1, keepdim=True)
        plpd = (probs - fallen.softmax(1)).gather(1, label).squeeze(1)
        kept = sure if self.plpd is None else sure & (plpd > self.plpd)

        weight = torch.zeros_like(plpd) if self.weights else torch.ones_like(plpd)
        if "entropy" in self.weights:
            weight = weight + (self.weight_margin * scale - entropies.detach()).exp()
        if "plpd" in self.weights:
            weight = weight + plpd.exp()
        return Objective(
            loss=mean_where(weight * entropies, kept),
            logits=logits,
            when=kept.any(),
            notes={"sure": sure, "kept": kept, "plpd": plpd, "destroyed_logits": fallen},
        )

    def destroyed(self, x: Tensor, draw: Draw) -> Tensor:
        """Return the images with their shapes destroyed."""
        height, width, n = *x.shape[-2:], self.patches
        if self.destroy == "occ":
            side, *corner = self.window or (0, 0, 0)
            middle = (height // 4, width // 4, height // 2, width // 2)
            return views.occluded(x, (*corner, side, side) if self.window else middle)
        if self.destroy == "pixel":
            make = partial(_permutations, 1, height * width, x.device)
            return views.shuffled_pixels(x, draw("pixels", make)[0])
        make = partial(_permutations, len(x), n * n, x.device)
        return views.shuffled_patches(x, draw("patches", make), n)


def _permutations(
    rows: int, length: int, device: torch.device, generator: torch.Generator
) -> Tensor:
    return torch.rand(rows, length, generator=generator, device=device).argsort(1)
