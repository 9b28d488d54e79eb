"""CoTTA: continual test-time adaptation by averaged teachers, averaged views and restoring.

Paper: Wang, Fink, Van Gool, Dai, CVPR 2022, arXiv 2203.13591.
Code that was recorded: qinenergy/cotta.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from testtime.adaptation import select, views
from testtime.adaptation.batchnorm import use_batch_statistics
from testtime.adaptation.core import Draw, Method, Net, Objective, Settled
from testtime.adaptation.optim import SGD, Adam, Tensors


@dataclass(frozen=True)
class CoTTA(Method):
    """Learn from a teacher, the moving average of the students; put some weights back at random.

    With student ``s``, teacher ``t`` and the source ``a`` in the configured network, on a batch::

        y = mean over views of t(view)  if mean_i max softmax(a(x_i)) < threshold,  else t(x)   (3)
        s descends -mean_i softmax(y_i) . log_softmax(s(x_i))                                 (1)
        t = rate * t + (1 - rate) * s                                                         (2)
        s = a where a mask of Bernoulli(restored) entries is set                           (7, 8)

    The answer is ``y``, so the teacher's from before the update. State: the teacher, the
    optimiser's, and the random generator.

    Fails with transformers at these rates, streams ordered by class, small batches, and inputs that
    are no images in [0, 1] once ``mean`` and ``std`` are undone. Slow: up to 34 forwards an image.
    While the teacher is the student (a first batch without views) there is nothing to learn, but
    Adam makes steps of rounding noise.

    Changed from the official code: dropout and the like stay off, every kind of BatchNorm uses the
    batch's statistics, views are made only where they are used (one look from the host). Presets:
    ``official`` is the code for CIFAR, ``"official", "imagenet"`` its constants for ImageNet-C with
    the paper's loss, ``"official", "imagenet", "symmetric"`` the code for ImageNet-C.

    Args:
        threshold: confidence of the source below which views are averaged: 0.92 for CIFAR-10, 0.72
            for CIFAR-100, 0.1 for ImageNet; take the 5% quantile on source data for others.
        restored: share of entries that go back to the source at every step.
        rate: of the teacher's moving average.
        views: how many views are averaged.
        loss_form: ``"cross_entropy"``, or its ``"symmetric"`` mean with the reverse.
        layers: the kinds of BatchNorm layers that normalise with the batch.
        train: run the whole network in train mode, dropout included.
    """

    optimizer: SGD | Adam | None = Adam(lr=1e-3)
    threshold: float = 0.92
    restored: float = 0.01
    rate: float = 0.999
    views: int = 32
    loss_form: Literal["cross_entropy", "symmetric"] = "cross_entropy"
    layers: tuple[type[nn.Module], ...] = select.BATCH_NORMS
    train: bool = False

    adapts = "all weights and biases"
    cost = (34, 1)
    tested = "one corruption after another without a reset, gradual ones too, batches of 64 to 200"
    looks = 2  # are views used? and in which order do their colours change?
    presets = {  # noqa: RUF012
        "official": {"layers": (nn.BatchNorm2d,), "train": True},
        "imagenet": {
            "optimizer": SGD(lr=0.01, momentum=0.9, nesterov=True),
            "threshold": 0.1,
            "restored": 0.001,
        },
        "symmetric": {"loss_form": "symmetric"},
    }

    def configure(self, module: nn.Module) -> nn.Module:
        """Make BatchNorm layers normalise with the batch, in train and in eval mode."""
        use_batch_statistics(module, self.layers)
        return module

    def select(self, module: nn.Module) -> list[str]:
        """Return the parameters called weight or bias (so no class tokens, no embeddings)."""
        return select.matching(module, r"(^|\.)(weight|bias)$")

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """Return the teacher, which is the whole memory, under the names of the weights."""
        views.require_images(net.images(x), type(self).__name__)
        return dict(net.weights)

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the student's cross-entropy to the teacher, and the teacher's logits."""
        student = net.train() if self.train else net
        # With buffers of their own: the statistics of other BatchNorm layers are the student's.
        teacher, source = (
            self.answering(net, net.buffers | values) for values in (memory, net.start)
        )
        confidence = source(x).softmax(1).amax(1).mean()
        if bool(confidence < self.threshold):

            def augmented(generator: torch.Generator) -> Tensor:
                return net.inputs(views.many(net.images(x), self.views, generator))

            answers = [teacher(view) for view in draw("views", augmented)]
            target = torch.stack(answers).mean(0)
        else:
            target = teacher(x)
        logits = student(x)
        loss = _cross_entropy(target, logits)
        if self.loss_form == "symmetric":
            loss = (loss + _cross_entropy(logits, target)) / 2
        return Objective(loss=loss.mean(), logits=target, notes={"confidence": confidence})

    def settle(self, net: Net, memory: Tensors, draw: Draw) -> Settled:
        """Return the student with some entries restored, and the teacher moved towards it."""
        start = net.start
        teacher = {k: self.rate * memory[k] + (1 - self.rate) * w for k, w in net.weights.items()}
        student = {
            k: torch.where(draw(f"restore.{k}", partial(self._mask, w)), start[k], w)
            for k, w in net.weights.items()
        }
        return Settled(values=student, memory=teacher)

    def answering(self, net: Net, memory: Tensors) -> Net:
        """Return the teacher."""
        teacher = net.at(memory)
        return teacher.train() if self.train else teacher

    def _mask(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(
            weight.shape, generator=generator, dtype=torch.float32, device=weight.device
        )
        return uniform < self.restored


def _cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return -(target.softmax(1) * logits.log_softmax(1)).sum(1)
