"""RoTTA: robust test-time adaptation in dynamic scenarios, by a balanced bank of images.

Paper: Yuan, Xie, Li, CVPR 2023, arXiv 2303.13899.
Code that was recorded: BIT-DA/RoTTA.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from testtime.adaptation import select, views
from testtime.adaptation.batchnorm import batch_norms, move_statistics_first
from testtime.adaptation.core import Draw, Method, Net, Objective, nothing_found
from testtime.adaptation.learner import Learner
from testtime.adaptation.methods import _bank
from testtime.adaptation.objectives import cross_entropy
from testtime.adaptation.optim import SGD, Adam, Tensors

_TEACHER, _BANK = "teacher.", "bank."


@dataclass(frozen=True)
class RoTTA(Method):
    """Learn from a teacher on a bank of recent, sure images of all classes; statistics move slowly.

    A bank of ``N`` images has room for ``N / C`` of each predicted class. An image that finds none
    takes the place of the worst of its class (where the bank is full but its class is not: of the
    largest classes), if that scores above it, with ``a`` its age in images and ``u`` the entropy of
    its prediction (equation 6)::

        score = timeliness / (1 + exp(-a / N)) + uncertainty * u / log C

    At every ``every``-th image, with student ``s``, teacher ``t``, BatchNorm's statistics ``m``::

        m = (1 - momentum) * m + momentum * the batch's, then normalise with m       (2 to 4)
        s descends  mean_j w_j * CE(t(x_j), s(view(x_j))),  w_j = sigmoid(-a_j / N)  (8, 9)
        t = rate * t + (1 - rate) * s                                                (10)

    Gradients go through the batch's part of ``m``. The answer is the teacher's, from before its
    batch. State: the teacher's weights and statistics, the optimiser's, the bank with its images.

    Fails with networks without BatchNorm (refused), short streams (its rates are slow), and more
    classes than the bank has room for: one image of each at most.

    Changed from the official code: dropout and the like stay off, every kind of BatchNorm adapts,
    and it can be reset, which empties the bank. Preset ``official``: BatchNorm1d and 2d alone, the
    whole network in train mode when it learns.

    Args:
        capacity: ``N``.
        every: images from one update to the next; they may lie in the middle of a batch.
        rate: of the teacher's moving average.
        momentum: of the statistics.
        timeliness: weight of the age in the score.
        uncertainty: weight of the entropy in the score.
        layers: the kinds of BatchNorm layers that adapt.
        train: run the whole network in train mode when it learns, dropout included.
    """

    optimizer: SGD | Adam | None = Adam(lr=1e-3)
    capacity: int = 64
    every: int = 64
    rate: float = 0.999
    momentum: float = 0.05
    timeliness: float = 1.0
    uncertainty: float = 1.0
    layers: tuple[type[nn.Module], ...] = select.BATCH_NORMS
    train: bool = False

    adapts = "the scales, shifts and statistics of BatchNorm layers"
    needs = "BatchNorm layers, colour images"
    tested = "one corruption after another without a reset, labels correlated in time"
    looks = 2  # at classes and entropies; in which order do the colours change?
    presets = {  # noqa: RUF012
        "official": {"layers": (nn.BatchNorm1d, nn.BatchNorm2d), "train": True}
    }

    def __post_init__(self) -> None:
        """Check the counts."""
        super().__post_init__()
        for what in ("capacity", "every"):
            if getattr(self, what) < 1:
                raise ValueError(
                    f"RoTTA({what}={getattr(self, what)}): it is a number of images, at least 1."
                )
        if self.steps != 1:
            raise ValueError(
                f"RoTTA(steps={self.steps}): it updates at every {self.every}-th image, once. "
                "Leave steps out, and let every be smaller."
            )

    @property
    def cost(self) -> tuple[int, int]:
        """The teacher on the image, then both on their share of the bank."""
        share = math.ceil(self.capacity / self.every)
        return (1 + 2 * share, share)

    def configure(self, module: nn.Module) -> nn.Module:
        """Make BatchNorm layers in train mode normalise with statistics that have moved."""
        layers = batch_norms(module, self.layers)
        if not layers:
            raise nothing_found(self, module)
        for layer in layers.values():
            move_statistics_first(layer, self.momentum)
        return module

    def select(self, module: nn.Module) -> list[str]:
        """Return the scales and shifts of the BatchNorm layers, and their statistics."""
        layers = tuple(batch_norms(module, self.layers))
        every = [
            *select.norm_affine(module, self.layers),
            *select.norm_statistics(module, self.layers),
        ]
        return [name for name in every if name.rpartition(".")[0] in layers]

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """Return the teacher and an empty bank."""
        views.require_images(net.images(x), type(self).__name__)
        if net.classes < 2:
            raise ValueError(
                "RoTTA balances its bank over the predicted classes, but the logits have one class "
                "alone. Give a logit to each of two, such as torch.cat([z, -z], 1) / 2."
            )
        teacher = {_TEACHER + k: net.start[k] for k in self.select(net.module)}
        return teacher | {_BANK + k: t for k, t in _bank.empty(x, self.capacity).items()}

    def answering(self, net: Net, memory: Tensors) -> Net:
        """Return the teacher."""
        return net.at(_under(_TEACHER, memory))

    def step(self, learner: Learner, x: Tensor) -> Tensor:
        """Take the images of a batch into the bank one by one, and learn at every so many-th."""
        logits = learner.answer()
        views.require_rows(logits, type(self).__name__)
        probs, held = logits.softmax(1), _under(_BANK, learner.work.memory)
        entropies = -(probs * (probs + 1e-6).log()).sum(1)
        items, seen, batch = _bank.look(held, probs.argmax(1), entropies)
        bank = _bank.Bank(
            self.capacity, logits.shape[1], self.timeliness, self.uncertainty, items, seen
        )
        everything = torch.cat([held["images"], x])
        updates = 0
        for row, (label, entropy) in enumerate(batch):
            bank.add(label, entropy, self.capacity + row)
            if bank.seen % self.every == 0:
                self._update(learner, bank.gather(everything), bank.ages(), f"views.{updates}")
                arrivals = torch.tensor([item.arrival for item in bank.items])
                learner.note(after=torch.tensor(row + 1), arrival=arrivals)
                updates += 1
        stored = bank.tensors(everything, held)
        learner.remember({_BANK + k: t for k, t in stored.items()})
        return logits

    def _update(self, learner: Learner, images: Tensor, ages: list[int], name: str) -> None:
        """Learn from the images of the bank, and move the teacher."""
        # In float32 whatever the model is, as the authors have it.
        age = torch.tensor([a / self.capacity for a in ages], dtype=torch.float32)
        fade = (-age).exp().to(images.device)
        weights = fade / (1 + fade)
        view = learner.draw(name, partial(self._view, learner.live, images))

        def loss(net: Net, x: Tensor, memory: Tensors) -> Objective:
            moving = None if self.train else batch_norms(net.module, self.layers)
            teacher, student = self.answering(net, memory).train(moving), net.train(moving)
            with torch.no_grad():
                target = teacher(images)
            losses = weights * cross_entropy(target, student(view))
            moved = {_TEACHER + k: b for k, b in teacher.buffers.items() if _TEACHER + k in memory}
            return Objective(loss=losses.mean(), memory=moved)

        objective, grads = learner.gradient(loss)
        learner.descend(grads)
        learner.remember(objective.memory)
        teacher = _under(_TEACHER, learner.work.memory)
        student = learner.work.weights
        learner.remember(
            {_TEACHER + k: self.rate * teacher[k] + (1 - self.rate) * w for k, w in student.items()}
        )
        learner.note(age=torch.tensor(ages), weight=weights)

    def _view(self, net: Net, x: Tensor, generator: torch.Generator) -> Tensor:
        return net.inputs(views.many(net.images(x), 1, generator)[0])


def _under(prefix: str, memory: Tensors) -> Tensors:
    return {k.removeprefix(prefix): t for k, t in memory.items() if k.startswith(prefix)}
