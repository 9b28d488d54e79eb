"""TTT++: test-time training with a contrastive task, and alignment of the features' moments.

Paper: Liu, Kothari, van Delft, Bellot-Gurlet, Mordan, Alahi, NeurIPS 2021, "TTT++: When Does
Self-Supervised Test-Time Training Fail or Thrive?".
Code that was recorded: vita-epfl/ttt-plus-plus.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.adaptation import views
from testtime.adaptation.alignment import Moments, Summary, contrastive, coral, mmd
from testtime.adaptation.core import Draw, Net, Objective
from testtime.adaptation.learner import Learner
from testtime.adaptation.methods._twoheads import TwoHeadsMethod
from testtime.adaptation.optim import SGD, Adam, Tensors
from testtime.adaptation.twoheads import TwoHeads

PARTS = ("features", "head")


@dataclass(frozen=True)
class TTTpp(TwoHeadsMethod):
    """Tell two views of an image from all others, with features distributed as the source's.

    Needs a :class:`TwoHeads` whose second head was trained jointly by a contrastive task, with
    ``branch`` at the classifier. With unit outputs ``f`` of that head for two views of ``B``
    images, ``s = f f^T / temperature``, and mean ``m`` and covariance ``S`` over the batch of both
    the features and the head's raw output (``_s``: the source's, of ``d`` values)::

        contrast = -(temperature / 0.07) <s_ij - ln sum_{k != i} exp s_ik>, j the other view of i
        align    = scale (|S - S_s|^2 / 4 d^2) / coral_s + (scale / 2) <(m - m_s)^2> / mmd_s

    The shared weights descend the sum. ``coral_s`` and ``mmd_s`` are what two batches of the source
    differ by, so ``source`` needs at least three batches, of the size of the test batches or, with
    a queue, of ``queue`` more. The answer comes after, with the running statistics as they are.
    Meant for several passes over the test data: ``adapted.fit(batches, passes=...)``, then
    ``predict``. State: the weights, the optimiser's, running statistics, the queue.

    Fails with small batches (few rows for a covariance; ``queue`` helps), shifts that change how
    often a class comes, and a head that was not trained jointly.

    Changed from the official code: dropout and the like stay off, it aligns from the first batch
    on, the rate does not follow the test error, which would need labels. Presets: ``official`` with
    the constants for CIFAR-10, in batches of 256; ``"official", "cifar100"`` those for CIFAR-100.
    As there, features are aligned in one forward and the head's output in another, and once the
    queue is full the batch at hand is in it too.

    Args:
        contrast: is there the contrastive task?
        align: the moments of the ``"features"``, of the ``"head"``'s output, or of both; empty: of
            none, which needs no source data.
        divergence: which moments: ``"coral"`` (covariances), ``"mmd"`` (means), or both.
        scales: of the alignment of the features and of the head's output.
        queue: so many rows of earlier batches count in the moments.
        temperature: of the contrastive task.
        warmup: batches that move running statistics alone.
        align_after: batches before there is any alignment.
    """

    optimizer: SGD | Adam | None = SGD(lr=0.01, momentum=0.9)
    head: bool = False
    contrast: bool = True
    align: tuple[str, ...] = PARTS
    divergence: tuple[str, ...] = ("coral", "mmd")
    scales: tuple[float, float] = (0.05, 0.2)
    queue: int = 0
    temperature: float = 0.5
    warmup: int = 0
    align_after: int = 0

    name = "ttt++"
    smallest_batch = 2
    task = "tells views of images apart"
    presets = {  # noqa: RUF012
        "official": {"train": True, "queue": 1280, "warmup": 80, "align_after": 120},
        "cifar100": {
            "optimizer": SGD(lr=0.0001, momentum=0.9),
            "scales": (5.0, 20.0),
            "queue": 1792,
        },
    }

    def __post_init__(self) -> None:
        """Refuse unknown words, and a choice that leaves nothing to learn."""
        super().__post_init__()
        for what, words in (("align", PARTS), ("divergence", ("coral", "mmd"))):
            if unknown := set(getattr(self, what)) - set(words):
                raise ValueError(f"TTTpp({what}=...) names {sorted(unknown)}: use {words}.")
        if not self.contrast and not (self.align and self.divergence):
            raise ValueError(
                "TTTpp(contrast=False) with nothing to align has nothing to learn from. Leave "
                "contrast, or align 'features' or 'head' by 'coral' or 'mmd'."
            )
        if min(self.queue, self.warmup, self.align_after) < 0:
            raise ValueError("TTTpp: queue, warmup and align_after are counts, of at least 0.")

    @property
    def needs_source(self) -> bool:
        """The source's moments are what is aligned with."""
        return bool(self.align)

    @property
    def cost(self) -> tuple[int, int]:
        """Two views, a forward for each moment that is aligned, and the answer."""
        learning = 2 * self.contrast + len(self.align)
        return (learning + 1, learning)

    def prepare(self, learner: Learner, batches: Iterable[Tensor]) -> Tensors:
        """Return the moments of the source, and what two of its batches differ by."""
        summaries = {part: Summary() for part in PARTS}
        for x in batches:
            for part, f in zip(PARTS, learner.live.eval().run(_both, x), strict=True):
                summaries[part].add(f)
        found = {part: summary.constants() for part, summary in summaries.items()}
        return {f"{k}_{part}": t for part, constants in found.items() for k, t in constants.items()}

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """Return the queues, zeros while they fill, and where the next rows go."""
        if not (self.queue and self.align):
            return {}
        means = {part: net.constants[f"mean_{part}"] for part in self.align}
        queues = {f"queue_{part}": m.new_zeros(self.queue, len(m)) for part, m in means.items()}
        return queues | {"next": torch.zeros((), dtype=torch.int64, device=x.device)}

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the contrastive loss and those of the alignment; the answer comes after."""
        learning = self.learning(net)
        losses: Tensors = {}
        changed: Tensors = {}
        if self.contrast:
            pairs = draw("views", lambda generator: self._views(net, x, generator))
            f = F.normalize(learning.run(TwoHeads.task, pairs.flatten(0, 1)), dim=1)
            losses["contrast"] = self.temperature / 0.07 * contrastive(f, self.temperature)
        for part in self.align if net.batch >= self.align_after else ():
            f = learning.run(TwoHeads.features if part == "features" else TwoHeads.task, x)
            moments = Moments.of(f)
            if self.queue:
                queue = memory[f"queue_{part}"]
                full, rows = queue[-1].any(), f[-self.queue :].detach()
                places = (memory["next"] + torch.arange(len(rows), device=x.device)) % self.queue
                queue = queue.index_copy(0, places, rows.to(queue.dtype))
                moments = moments.plus(Moments.of(queue), full)
                changed |= {f"queue_{part}": queue, "next": (places[-1] + 1) % self.queue}
            losses[f"align_{part}"] = self._distance(net.constants, part, moments)
        return Objective(
            loss=torch.stack(list(losses.values())).sum(),
            memory=changed,
            when=torch.full((), net.batch >= self.warmup, device=x.device),
            notes=losses,
        )

    def _views(self, net: Net, x: Tensor, generator: torch.Generator) -> Tensor:
        images = net.images(x)
        if net.batch == 0:
            views.require_images(images, type(self).__name__)
        return net.inputs(torch.stack([views.contrastive(images, generator) for _ in range(2)]))

    def _distance(self, source: Tensors, part: str, moments: Moments) -> Tensor:
        scale = self.scales[PARTS.index(part)]
        coral_gap = coral(source[f"cov_{part}"], moments.covariance) / source[f"coral_{part}"]
        mmd_gap = mmd(source[f"mean_{part}"], moments.mean) / source[f"mmd_{part}"]
        gaps = {"coral": scale * coral_gap, "mmd": 0.5 * scale * mmd_gap}
        return torch.stack([gaps[kind] for kind in self.divergence]).sum()


def _both(model: TwoHeads, x: Tensor) -> tuple[Tensor, Tensor]:
    features = model.features(x)
    return features, model.head(features)
