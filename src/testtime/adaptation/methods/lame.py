"""LAME: predictions of a batch corrected towards those of their neighbours, without gradients.

Paper: Boudiaf, Mueller, Ben Ayed, Bertinetto, CVPR 2022, arXiv 2201.05718.
Code that was recorded: fiveai/LAME.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testtime.adaptation import heads
from testtime.adaptation.core import Draw, Method, Net, Objective
from testtime.adaptation.optim import Tensors


@dataclass(frozen=True)
class LAME(Method):
    """Give images with like features like predictions; the network stays as it is.

    With the source's predictions ``p`` and unit features ``g``, on a batch::

        K_ij = the affinity of g_i and g_j        Y = p
        Y_i = softmax_k(ln p_ik + sum_j K_ij Y_jk),    until it stands still

    The answer is ``ln Y``: log-probabilities, whose softmax is ``Y``. State: none. The affinity is
    ``"knn"``: 1 for the k nearest others; ``"linear"``: ``g_i . g_j``; ``"rbf"``:
    ``exp(-|g_i - g_j|^2 / 2 s^2)``, ``s`` the mean distance to the k-th nearest, oneself the first.

    Fails on batches whose classes are balanced: by a point or two, and by far more under ``"rbf"``,
    where every image pulls at every other; and with more classes than a batch has images. Strong
    where neighbours in a stream are of one class. A single image has no neighbours.

    Changed from the official code: the symmetric affinity of 5 neighbours, as later comparisons
    have it; images that are all alike have an affinity of 1 under ``"rbf"``, not NaN; all
    ``max_steps`` are computed, and those after the stop masked. Preset ``official``: ``"rbf"``,
    for streams ordered by class.

    Args:
        affinity: see above.
        k: neighbours; read by ``"rbf"`` and ``"knn"``.
        symmetric: the mean of ``K`` and its transpose.
        max_steps: at most so many updates of ``Y``.
        head: the dotted name of the classifier whose inputs are the features; none: it is found.
    """

    affinity: Literal["knn", "rbf", "linear"] = "knn"
    k: int = 5
    symmetric: bool = True
    max_steps: int = 100
    head: str | None = None

    adapts = "nothing"
    cost = (1, 0)
    presets = {"official": {"affinity": "rbf", "symmetric": False}}  # noqa: RUF012

    def __post_init__(self) -> None:
        """Refuse unknown words and numbers."""
        super().__post_init__()
        if self.affinity not in ("rbf", "knn", "linear"):
            raise ValueError(
                f"LAME(affinity={self.affinity!r}) is not known: use 'knn', 'rbf' or 'linear'."
            )
        for what in ("k", "max_steps"):
            if getattr(self, what) < 1:
                raise ValueError(f"LAME({what}={getattr(self, what)}): it must be at least 1.")
        if self.optimizer or self.steps != 1:
            raise ValueError("LAME has no loss to descend: leave optimizer and steps out.")

    def configure(self, module: nn.Module) -> nn.Module:
        """Look for the classifier, so that a model without one is refused at once."""
        heads.find(self, module, self.head)
        return module

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """See that the classifier that was found is the one; no memory."""
        if self.head is None:
            heads.require_logits(net, x, heads.find(self, net.module))
        return {}

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the log-probabilities that the batch agrees on."""
        answer, notes = self._corrected(net, x)
        return Objective(logits=answer, notes=notes)

    def answering(self, net: Net, memory: Tensors) -> Net:
        """Refuse: no network answers as the batch does."""
        raise ValueError(
            "LAME corrects the predictions of a batch by one another, which no plain module can "
            "do. Keep the adapted model; its network is your own, unchanged."
        )

    def predict(self, net: Net, x: Tensor, memory: Tensors) -> Tensor:
        """Return what the batch agrees on; nothing changes either way."""
        return self._corrected(net, x)[0]

    def kernel(self, unit: Tensor) -> Tensor:
        """Return the affinities ``[B, B]`` of unit features ``[B, D]``."""
        distances = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
        count = len(unit)
        if self.affinity == "linear":
            kernel = unit @ unit.T
        elif self.affinity == "rbf":
            nearest = distances.topk(min(self.k, count), largest=False).values
            width = 2 * nearest[:, -1].mean().square()
            kernel = (-distances.square() / width.clamp(min=1e-20)).exp()
        else:
            nearest = distances.topk(min(self.k + 1, count), largest=False).indices
            kernel = torch.zeros_like(distances).scatter(1, nearest[:, 1:], 1.0)
        return (kernel + kernel.T) / 2 if self.symmetric else kernel

    def _corrected(self, net: Net, x: Tensor) -> tuple[Tensor, Tensors]:
        features, logits = heads.features(net, x, heads.find(self, net.module, self.head))
        dtype = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            kernel = self.kernel(F.normalize(features.to(dtype)))
            answer, energies = self._agree(kernel, logits.to(dtype).softmax(1))
        return answer.to(logits.dtype), {"kernel": kernel, "energies": energies}

    def _agree(self, kernel: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``ln Y``, and the energy of each step that ran, NaN after the stop."""
        known = (probs + 1e-10).log()
        answer, before = known.log_softmax(1), kernel.new_tensor(torch.nan)
        stopped, energies = torch.zeros((), dtype=torch.bool, device=kernel.device), []
        for step in range(self.max_steps):
            pull = kernel @ answer.exp()
            moved = (known + pull).log_softmax(1)
            y = moved.exp()
            energy = (y * (y.clamp(min=1e-20).log() - known - pull)).sum()
            answer = torch.where(stopped, answer, moved)
            energies.append(torch.where(stopped, torch.nan, energy))
            if step > 1:
                stopped = stopped | ((energy - before).abs() <= 1e-8 * before.abs())
            before = energy
        return answer, torch.stack(energies)
