"""T3A: a classifier of prototypes that the test data adjust, without gradients.

Paper: Iwasawa, Matsuo, NeurIPS 2021 (Test-Time Classifier Adjustment Module for Model-Agnostic
Domain Generalization). Code that was recorded: matsuolab/T3A.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testtime.adaptation import heads
from testtime.adaptation.core import Draw, Method, Net, Objective, Settled
from testtime.adaptation.objectives import entropy
from testtime.adaptation.optim import Tensors


@dataclass(frozen=True)
class T3A(Method):
    """Put the mean direction of each class's surest features in the place of its weights.

    With the source's classifier ``w, b`` and features ``f_i``, image ``i`` supports the class that
    the source predicts, by its entropy; ``w_k`` themselves are the first supports. Of each class
    the ``filter_k`` supports of the lowest entropy stay, the batch's own among them, and::

        z_ik = f_i . c_k    c_k = the unit vector along the sum of f / |f| over supports of k

    State: the supports, ``filter_k`` rows a class; and the classifier, whose bias is then zero. The
    answer has seen its own batch. A class without supports has ``c_k = 0``.

    Fails where early mistakes are sure of themselves, for they stay, and with classes that are
    never or seldom predicted. Its answers are badly calibrated: ``f`` is not normalised.

    Changed from the official code: ``predict`` filters nothing, and answers by the source's
    classifier before the first batch. Preset ``unfiltered``: that code's ``K = -1``, in which every
    class loses its least sure support at every batch, here with a bound on them.

    Args:
        filter_k: supports that stay of each class; 1 to 100, on held-out source data, or 20.
        loses_last: every class loses its least sure support at every batch.
        head: the dotted name of the classifier; none: it is found.
    """

    filter_k: int = 20
    loses_last: bool = False
    head: str | None = None

    adapts = "the classifier, a Linear layer"
    cost = (1, 0)
    presets = {  # noqa: RUF012
        "official": {},
        "unfiltered": {"filter_k": 100, "loses_last": True},
    }

    def __post_init__(self) -> None:
        """Refuse a bank without rows, and what is not read."""
        super().__post_init__()
        if self.filter_k < 1:
            raise ValueError(
                f"T3A(filter_k={self.filter_k}): it is a number of supports a class, at least 1. "
                "The official code's -1 is T3A.preset('unfiltered')."
            )
        if self.optimizer or self.steps != 1:
            raise ValueError("T3A has no loss to descend: leave optimizer and steps out.")

    def select(self, module: nn.Module) -> list[str]:
        """Return weight and bias of the classifier."""
        head = heads.find(self, module, self.head)
        parts = dict(module.get_submodule(head).named_parameters())
        if "weight" not in parts:
            raise ValueError(
                f"T3A replaces the weight of '{head}', but that is computed from {list(parts)}. "
                "Remove the parametrisation first, or use another method."
            )
        return [f"{head}.{part}" for part in ("weight", "bias") if part in parts]

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """Return the bank: the source's weights as its first rows, the others empty."""
        heads.require_logits(net, x, heads.find(self, net.module, self.head))
        weight, *bias = (w.detach() for w in net.weights.values())
        rows = _supports(weight, F.linear(weight, weight, *bias))
        free = len(weight) * (self.filter_k - 1)
        return {
            "features": F.pad(rows["features"], (0, 0, 0, free)),
            "labels": F.pad(rows["labels"], (0, free), value=len(weight)),  # of no class
            "entropies": F.pad(rows["entropies"], (0, free), value=torch.inf),
        }

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the logits of the prototypes that the batch has taken part in."""
        source = net.at({name: net.start[name] for name in net.weights})
        features, logits = heads.features(source, x, heads.find(self, net.module, self.head))
        new = _supports(features, logits)
        supports = self.filtered({k: torch.cat([memory[k], new[k]]) for k in memory}, net.classes)
        answer = new["features"] @ _prototypes(supports, net.classes).T
        return Objective(logits=answer.to(logits.dtype), memory=supports)

    def settle(self, net: Net, memory: Tensors, draw: Draw) -> Settled:
        """Return the prototypes as the classifier's weights."""
        weight, *bias = net.weights
        zero = {name: torch.zeros_like(net.weights[name]) for name in bias}
        return Settled({weight: _prototypes(memory, net.classes), **zero})

    def filtered(self, rows: Tensors, classes: int) -> Tensors:
        """Return the surest rows of each class, class by class and by rising entropy; then none.

        Args:
            rows: ``features [N, D]``, ``labels [N]`` and ``entropies [N]``; label C: no row.
            classes: C. There are ``C * filter_k`` rows in the result.
        """
        order = rows["entropies"].argsort(stable=True)
        order = order[rows["labels"][order].argsort(stable=True)]
        labels = rows["labels"][order]
        place = torch.arange(len(labels), device=labels.device)
        first = torch.searchsorted(labels, labels)
        stays = (labels < classes) & (place - first < self.filter_k)
        if self.loses_last:
            stays &= place + 1 < torch.searchsorted(labels, labels, right=True)
        labels = labels.where(stays, classes)
        kept = (~stays).to(torch.uint8).argsort(stable=True)[: classes * self.filter_k]
        order, stays = order[kept], stays[kept]
        return {
            "features": rows["features"][order] * stays[:, None],
            "labels": labels[kept],
            "entropies": rows["entropies"][order].where(stays, torch.inf),
        }


def _supports(features: Tensor, logits: Tensor) -> Tensors:
    # In half precision entropies would tie, and ties would decide what stays.
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    return {
        "features": features.detach().to(logits.dtype),
        "labels": logits.argmax(1),
        "entropies": entropy(logits),
    }


def _prototypes(supports: Tensors, classes: int) -> Tensor:
    unit = F.normalize(supports["features"])
    sums = unit.new_zeros(classes + 1, unit.shape[1]).index_add(0, supports["labels"], unit)
    return F.normalize(sums[:classes])
