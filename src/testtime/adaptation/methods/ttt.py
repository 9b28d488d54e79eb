"""TTT: test-time training with rotation prediction.

Paper: Sun, Wang, Liu, Miller, Efros, Hardt, ICML 2020, arXiv 1909.13231.
Code that was recorded: yueatsprograms/ttt_cifar_release.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.adaptation import views
from testtime.adaptation.calls import describe
from testtime.adaptation.core import Draw, Net, Objective
from testtime.adaptation.methods._twoheads import TwoHeadsMethod
from testtime.adaptation.optim import SGD, Adam, Tensors
from testtime.adaptation.twoheads import TwoHeads


@dataclass(frozen=True)
class TTT(TwoHeadsMethod):
    """Learn to tell how views of the image are turned, then answer.

    Needs a :class:`TwoHeads` whose second head was trained jointly to predict rotations (0: none,
    1 to 3: so many quarter turns counter-clockwise); ``testtime.train.joint`` has that step. With
    shared weights ``e`` and head ``h``, ``views`` crops and flips of each image, each turned by a
    random class ``r``::

        e, h descend <cross_entropy(h(e(turned view)), r)>, steps times; then answer from e

    This is the online version, which keeps what it has learned: one step. The standard version
    starts from the source at every image: preset ``standard`` with ``episodic="sample"``. A batch
    of several images takes its steps together. State: the weights, and the random generator; with
    BatchNorm its running statistics, which move with the views.

    Fails where a turned image is as likely as an upright one, with a head that was not trained
    jointly, and online where the stream's order misleads. Slow: ``views`` forwards and backwards a
    step for an image.

    Changed from the official code: dropout and the like stay off. Presets: ``official`` is the
    code, ``"official", "standard"`` its other version; ``bn`` the threshold for BatchNorm.

    Args:
        views: of each image, in each step.
        threshold: adapt only if the mean probability that the images are upright is below; none:
            always. The code adds 0.001 to its own.
        padding: of the crops, in black pixels; none: an eighth of the side.
    """

    optimizer: SGD | Adam | None = SGD(lr=0.001)
    views: int = 32
    threshold: float | None = None
    padding: int | None = None

    task = "predicts rotations"
    presets = {  # noqa: RUF012
        "official": {"train": True},
        "standard": {"steps": 10},
        "bn": {"threshold": 0.901},
    }

    def __post_init__(self) -> None:
        """Check the number of views."""
        super().__post_init__()
        if self.views < 1:
            raise ValueError(f"TTT(views={self.views}): at least one view is needed.")

    @property
    def cost(self) -> tuple[int, int]:
        """The views, the image to answer, and to be sure that it is upright."""
        return (self.views + 1 + (self.threshold is not None), self.views)

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """Refuse what cannot be turned; return whether this batch adapts."""
        if x.dim() != 4 or x.shape[-2] != x.shape[-1] or not x.is_floating_point():
            raise ValueError(
                f"TTT turns square images [B, C, H, H], but the input is {describe(x)}. Crop them, "
                "or use a method without augmentations."
            )
        return {"adapts": torch.ones((), dtype=torch.bool, device=x.device)}

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the cross-entropy of the rotations; the answer comes after."""
        adapts, notes = memory["adapts"], {}
        if self.threshold is not None:
            if net.inner == 0:
                still = net.at({k: w.detach() for k, w in net.weights.items()}).eval()
                upright = still.run(TwoHeads.task, x).softmax(1)[:, 0].mean()
                adapts, notes = upright < self.threshold, {"upright": upright}
            before = {k: b.clone() for k, b in net.buffers.items()}
        padding = x.shape[-1] // 8 if self.padding is None else self.padding

        def crops(generator: torch.Generator) -> Tensor:
            drawn = views.crop_draws(x, self.views, padding, generator)
            return net.inputs(views.crops(net.images(x), *drawn, padding))

        labels = draw("labels", partial(self._labels, x)).flatten()
        turned = views.turned(draw("views", crops).flatten(0, 1), labels)
        loss = F.cross_entropy(self.learning(net).run(TwoHeads.task, turned), labels)
        if self.threshold is not None:  # without a step there would have been no forward either
            net.buffers.update(
                {k: torch.where(adapts, net.buffers[k], b) for k, b in before.items()}
            )
        return Objective(loss=loss, memory={"adapts": adapts}, when=adapts, notes=notes)

    def _labels(self, x: Tensor, generator: torch.Generator) -> Tensor:
        shape = (self.views, len(x))
        return torch.randint(4, shape, generator=generator, device=x.device)
