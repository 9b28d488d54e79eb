"""ETA and EATA: entropy minimization on reliable and new predictions, without forgetting.

Paper: Niu, Wu, Zhang, Chen, Zheng, Zhao, Tan, ICML 2022, arXiv 2204.02610.
Code that was recorded: mr-eggplant/EATA; for GroupNorm and LayerNorm mr-eggplant/SAR.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testtime.adaptation.core import Draw, Net, Objective
from testtime.adaptation.learner import Learner
from testtime.adaptation.methods._norm import EntropyMethod
from testtime.adaptation.objectives import OpinionEntropy, mean_where
from testtime.adaptation.optim import SGD, Adam, Tensors


@dataclass(frozen=True)
class ETA(EntropyMethod):
    """Descend the entropy of predictions that are sure and unlike those before.

    With ``p_i`` the probabilities of prediction ``i``, ``H_i`` its entropy, ``E0`` a share of
    ``ln C``, and ``m`` the moving average of the probabilities that were kept::

        keep = {i: H_i < E0 and |cos(m, p_i)| < redundancy}
        loss = <exp(E0 - H_i) H_i>_keep, no gradient through the weight
        m = 0.9 m + 0.1 <p_i>_keep, or <p_i>_keep where there is none yet

    With an empty ``keep`` nothing changes, momentum included; while there is no ``m`` every sure
    prediction is kept. The answer is from before the update. Dense logits: each place is a
    prediction. State: the optimiser's, ``m``, and counts of the sure and of the kept.

    Fails with streams ordered by class (all is redundant), small batches under BatchNorm, and a
    ``redundancy`` that was chosen for another number of classes.

    Changed from the official code: dropout and the like stay off, every kind of norm layer adapts,
    a reset clears ``m`` and the counts, ``redundancy`` follows from the number of classes. The
    paper sums the weighted losses and averages ``p`` over the whole batch; this is the code's mean
    and its average over the kept. Presets: ``official`` is the code, ``"official", "sar"`` its form
    for GroupNorm and LayerNorm; ``imagenet`` and ``cifar10`` are the constants of the paper;
    ``come`` is the objective of 2410.10894.

    Args:
        margin: ``E0`` as a share of ``ln C``.
        redundancy: the cosine to ``m`` from which on a prediction tells nothing new; none: through
            the paper's 0.4 for 10 and 0.05 for 1000 classes, a straight line in logarithms.
    """

    optimizer: SGD | Adam | None = SGD(lr=0.00025, momentum=0.9)
    margin: float = 0.4
    redundancy: float | None = None

    presets = {  # noqa: RUF012
        "official": {"layers": (nn.BatchNorm2d,), "train": True, "survives": ("memory",)},
        "sar": {"layers": (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)},
        "imagenet": {"redundancy": 0.05},
        "cifar10": {"optimizer": SGD(lr=0.005, momentum=0.9), "redundancy": 0.4},
        "come": {"entropy": OpinionEntropy()},
    }

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """Return the average, zeros while there is none, and the counts."""
        sure = 1 / math.sqrt(net.classes)
        if self.redundancy is not None and self.redundancy <= sure:
            net.say(
                f"{type(self).__name__}(redundancy={self.redundancy}) does not fit "
                f"{net.classes} classes: a sure prediction has a cosine of {sure:.3f} to a uniform "
                "average, so that next to nothing is kept after the first batch. Leave it out, and "
                "it follows from the number of classes."
            )
        weight = next(iter(net.weights.values()))
        count = torch.zeros((), dtype=torch.int64, device=x.device)
        return {"average": weight.new_zeros(net.classes), "reliable": count, "selected": count}

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the weighted mean entropy of what is kept, and all logits."""
        logits = self.predict(net, x, memory)
        rows = logits.movedim(1, -1).flatten(0, -2)
        average, probs = memory["average"], rows.softmax(1).to(memory["average"].dtype).detach()
        entropies, margin = self.entropy(rows), self.margin * math.log(rows.shape[1])

        reliable = entropies < margin
        cosine = F.cosine_similarity(average.unsqueeze(0), probs)  # zero while there is no average
        kept = reliable & (cosine.abs() < self._redundancy(rows.shape[1]))
        weighted = (margin - entropies.detach()).exp() * entropies

        now = (probs * kept.unsqueeze(1)).sum(0) / kept.sum().clamp(min=1)
        moved = torch.where(average.any(), 0.9 * average + 0.1 * now, now)
        moved = torch.where(kept.any(), moved, average)
        return Objective(
            loss=mean_where(weighted, kept) + self.regulariser(net),
            logits=logits,
            memory={
                "average": moved,
                "reliable": memory["reliable"] + reliable.sum(),
                "selected": memory["selected"] + kept.sum(),
            },
            when=kept.any(),
            notes={
                "reliable": reliable,
                "kept": kept,
                "entropy": entropies,
                "cosine": cosine,
                "average": moved,
            },
        )

    def regulariser(self, net: Net) -> Tensor | float:
        """Return what is added to the loss, once a step."""
        return 0.0

    def _redundancy(self, classes: int) -> float:
        if self.redundancy is not None:
            return self.redundancy
        return float(0.4 * (classes / 10) ** (math.log(0.05 / 0.4) / math.log(1000 / 10)))


@dataclass(frozen=True)
class EATA(ETA):
    """ETA, held to the source where that matters: by the Fisher information of each weight.

    With ``w`` the adapting scales and shifts, ``w0`` the source's, and ``F`` the mean over source
    batches of the squared gradient of their cross-entropy to the source's own predictions, the loss
    is ETA's plus ``strength * sum F (w - w0)^2``. Needs some source batches
    (the authors take 2,000 images in batches of 64), without labels.

    Fails as ETA does, and with ``F`` from few images. ``F`` is of batches, as in the code, and not
    of samples, as in the paper: ``strength`` is meant for the former and batches of 64.

    Args:
        strength: of the regulariser: 2000 for ImageNet, 1 for CIFAR-10.
    """

    strength: float = 2000.0

    needs_source = True
    presets = {  # noqa: RUF012
        **ETA.presets,
        "cifar10": {**ETA.presets["cifar10"], "strength": 1.0},
    }

    def prepare(self, learner: Learner, batches: Iterable[Tensor]) -> Tensors:
        """Return the diagonal of the Fisher information of each adapting tensor, by its name."""
        fisher = {name: torch.zeros_like(w) for name, w in learner.live.weights.items()}
        count = 0
        for count, _ in enumerate(batches, 1):  # noqa: B007
            _, gradient = learner.gradient(self._own_labels)
            fisher = {k: f + gradient[k] ** 2 if k in gradient else f for k, f in fisher.items()}
        return {name: total / count for name, total in fisher.items()}

    def _own_labels(self, net: Net, x: Tensor, memory: Tensors) -> Objective:
        logits = self.predict(net, x, memory)
        return Objective(loss=F.cross_entropy(logits, logits.argmax(1)))

    def regulariser(self, net: Net) -> Tensor | float:
        """Return the distance from the source, weighted by the Fisher information."""
        start = net.start
        terms = [(net.constants[k] * (w - start[k]) ** 2).sum() for k, w in net.weights.items()]
        return self.strength * torch.stack(terms).sum()
