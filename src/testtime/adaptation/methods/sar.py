"""SAR: sharpness-aware and reliable entropy minimization, for batches as they come.

Paper: Niu, Wu, Zhang, Wen, Chen, Zhao, Tan, ICLR 2023, arXiv 2302.12400.
Code that was recorded: mr-eggplant/SAR.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from testtime.adaptation.core import Draw, Net, Objective, Settled
from testtime.adaptation.methods._norm import EntropyMethod
from testtime.adaptation.objectives import mean_where
from testtime.adaptation.optim import SGD, Adam, Tensors


@dataclass(frozen=True)
class SAR(EntropyMethod):
    """Descend the entropy of reliable predictions at the sharpest point near the present weights.

    With ``H_i(t)`` the entropy of prediction ``i`` under scales and shifts ``t``, ``E0`` a share of
    ``ln C``, and ``<>`` the mean over reliable predictions (equations 2 to 4)::

        R1 = {i: H_i(t) < E0}          g = grad <H(t)>_R1          s = t + rho * g / |g|
        R2 = {i in R1: H_i(s) < E0}    t descends grad <H(s)>_R2

    State: the optimiser's, and the moving average ``e = 0.9 e + 0.1 <H(s)>_R2``; where it is below
    ``recovery`` the weights go back to the source's. The answer is from ``t``, before the update.
    A batch without reliable predictions has gradient zero; momentum goes on.

    Fails with BatchNorm in small batches, with few reliable predictions (slow), and with few
    classes: ``recovery`` is not a share of ``ln C``, so easy data recover all the time.

    Changed from the official code: dropout and the like stay off, every kind of norm layer adapts,
    ``e`` starts afresh after a recovery (as the paper has it), a reset clears the momentum. Preset
    ``official``: none of this; ``paper``: that, but ``e`` starts afresh; ``vit``: the rate for
    vision transformers, batches of 64. Below that (ResNet: below 32) scale it with the batch.

    Args:
        margin: ``E0`` as a share of ``ln C``.
        rho: how far the sharpest point is.
        recovery: the moving average of the loss that is too low.
        fixed: not those of modules in whose name this regular expression is found (the last
            stage of a ResNet, the last blocks of a ViT-B and its last norm).
        average_survives: ``e`` stays as it is after a recovery, so that recoveries repeat.
    """

    optimizer: SGD | Adam | None = SGD(lr=0.00025, momentum=0.9)
    margin: float = 0.4
    rho: float = 0.05
    recovery: float = 0.2
    fixed: str = r"layer4|blocks\.9|blocks\.1[01]|norm\.|^norm$"
    average_survives: bool = False

    adapts = "the scales and shifts of normalisation layers below the last stage"
    cost = (2, 2)
    tested = "single images, mixed shifts and streams ordered by class, GroupNorm and LayerNorm"
    presets = {  # noqa: RUF012
        "official": {
            "layers": (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm),
            "train": True,
            "average_survives": True,
            "survives": ("slots",),
        },
        "paper": {
            "layers": (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm),
            "train": True,
            "survives": ("slots",),
        },
        "vit": {"optimizer": SGD(lr=0.001, momentum=0.9)},
    }

    def select(self, module: nn.Module) -> list[str]:
        """Return the scales and shifts of the norm layers that are not fixed."""
        names = super().select(module)
        return [name for name in names if not re.search(self.fixed, name.rpartition(".")[0])]

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """Return the moving average, and whether there is one yet."""
        average = torch.zeros((), device=x.device)
        return {"average": average, "has_average": average.bool()}

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the mean entropy at the sharpest point, and the logits of the present one."""

        def here(net: Net) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            logits = self.predict(net, x, memory)
            entropies = self.entropy(logits)
            reliable = entropies < self.margin * math.log(logits.shape[1])
            return mean_where(entropies, reliable), (logits, reliable)

        gradient, (logits, reliable) = net.gradient(here)
        norm = torch.stack([g.norm() for g in gradient.values()]).norm()
        scale = self.rho / (norm + 1e-12)
        sharpest = net.at({k: w + scale * gradient[k] for k, w in net.weights.items()})

        sharp = self.predict(sharpest, x, memory)
        entropies = self.entropy(sharp)
        still = reliable & (entropies < self.margin * math.log(logits.shape[1]))
        loss = mean_where(entropies, still)

        moved = torch.where(memory["has_average"], 0.9 * memory["average"] + 0.1 * loss, loss)
        return Objective(
            loss=loss,
            logits=logits,
            memory={
                "average": torch.where(still.any(), moved, memory["average"]),
                "has_average": memory["has_average"] | still.any(),
            },
            notes={
                "reliable": reliable,
                "still_reliable": still,
                "entropy": self.entropy(logits),
                "sharpest_entropy": entropies,
                "sharpest_logits": sharp,
            },
        )

    def settle(self, net: Net, memory: Tensors, draw: Draw) -> Settled:
        """Return the source's weights where the moving average is too low."""
        recover = memory["has_average"] & (memory["average"] < self.recovery)
        start = net.start
        changing = net.weights | net.buffers
        back = {k: torch.where(recover, start[k], v) for k, v in changing.items()}
        has = memory["has_average"] & (~recover | self.average_survives)
        average = memory["average"].where(has, torch.nan)
        return Settled(back, {"has_average": has}, notes={"recovered": recover, "average": average})
