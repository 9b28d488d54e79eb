"""TENT: fully test-time adaptation by entropy minimization.

Paper: Wang, Shelhamer, Liu, Olshausen, Darrell, ICLR 2021, arXiv 2006.10726.
Code that was recorded: DequanWang/tent; for GroupNorm and LayerNorm mr-eggplant/SAR.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from testtime.adaptation.core import Draw, Net, Objective
from testtime.adaptation.methods._norm import EntropyMethod
from testtime.adaptation.optim import SGD, Adam, Tensors


@dataclass(frozen=True)
class Tent(EntropyMethod):
    """Descend the mean entropy of the predictions by the scales and shifts of the norm layers.

    Loss (equation 1): ``mean_i H(softmax(z_i))``; dense logits: the mean over pixels too. Batch
    normalisation uses the batch's own mean and biased variance. The answer is from before the
    update. State: the optimiser's.

    Fails with high rates or long streams (every prediction in one class), small batches under
    BatchNorm, streams ordered by class, mixed shifts.

    Changed from the official code: dropout and the like stay off; every kind of norm layer adapts,
    BatchNorm1d and 3d among them. Preset ``official``: BatchNorm2d alone, and the whole network in
    train mode; ``sar``: that with GroupNorm and LayerNorm; ``imagenet``: the paper's SGD.
    """

    optimizer: SGD | Adam | None = Adam(lr=1e-3)

    tested = "corruptions one at a time, batches of 64 to 200; also for a whole stream by others"
    presets = {  # noqa: RUF012 - read only, as every class variable of a method
        "official": {"layers": (nn.BatchNorm2d,), "train": True},
        "sar": {
            "layers": (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm),
            "train": True,
            "optimizer": SGD(lr=0.00025, momentum=0.9),
        },
        "imagenet": {"optimizer": SGD(lr=0.00025, momentum=0.9)},
    }

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the mean entropy and the logits that gave it."""
        logits = self.predict(net, x, memory)
        return Objective(loss=self.entropy(logits).mean(), logits=logits)
