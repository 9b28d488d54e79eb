"""FOA: prompts that an evolution strategy finds by forward passes alone, and a shift of features.

Paper: Niu, Miao, Chen, Wu, Zhao, ICML 2024, arXiv 2404.01650.
Code that was recorded: mr-eggplant/FOA.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from testtime.adaptation import evolution, select, tokens
from testtime.adaptation.core import Draw, Method, Net, Objective
from testtime.adaptation.objectives import entropy
from testtime.adaptation.optim import SGD, Tensors

if TYPE_CHECKING:
    from testtime.adaptation.learner import Learner


@dataclass(frozen=True)
class FOA(Method):
    """Choose among prompts, drawn by CMA-ES, those of sure predictions with the source's features.

    With ``m, s`` mean and deviation over the batch of the class token after every block, ``m^s,
    s^s`` the same on source data, and ``H_i`` the entropy of prediction ``i``::

        fitness = lambda B/64 (|s - s^s|^2 + |m - m^s|^2) + sum_i H_i
        answer  = head(f + m^s - h)    h = rate h + (1 - rate) m    of the last block

    ``popsize`` prompts are drawn and the best of the last batch is tried again; the answer is that
    of the best, shifted by ``h`` from before this batch. Variant ``"shift"`` does that alone;
    ``"bp"`` descends ``lambda (mean |s - s^s|^2 + mean |m - m^s|^2) + mean H`` by the norm layers.
    State: ``h``, the best prompts, and the distribution of CMA-ES (two matrices of ``prompts * D``
    squared); the optimiser's under ``"bp"``. Constants: ``m^s, s^s``, of 32 images or more.

    Fails in small batches: one image has no deviation. Slow: 28 forwards an image.

    Changed from the official code: random numbers are torch's, a reset brings the first prompts
    back, and ``predict`` answers by the best prompts of the last batch, before it by none. Presets
    ``shift`` and ``bp``: those variants; the network is in eval mode in each, as there.

    Args:
        variant: see above.
        prompts: tokens put in after the class token.
        strength: ``lambda``; 0.2 (``"bp"``: 20) for ImageNet-R.
        popsize: prompts drawn for each batch.
        sigma: deviation that they are drawn with at first.
        rate: of the moving average ``h``.
        head: the dotted name of the classifier; none: it is found.
    """

    variant: Literal["foa", "shift", "bp"] = "foa"
    prompts: int = 3
    strength: float = 0.4
    popsize: int = 27
    sigma: float = 1.0
    rate: float = 0.9
    head: str | None = None

    adapts = "prompts and a shift of a vision transformer's class token"
    needs_source = True
    smallest_batch = 2
    presets = {  # noqa: RUF012
        "official": {},
        "shift": {"variant": "shift"},
        "bp": {"variant": "bp", "optimizer": SGD(lr=0.005, momentum=0.9), "strength": 30.0},
    }

    def __post_init__(self) -> None:
        """Refuse unknown words, and an optimiser where nothing descends."""
        super().__post_init__()
        if self.variant not in ("foa", "shift", "bp"):
            raise ValueError(
                f"FOA(variant={self.variant!r}) is not known: use 'foa', 'shift' or 'bp'."
            )
        if (self.variant == "bp") != (self.optimizer is not None):
            raise ValueError(
                f"FOA(variant={self.variant!r}, optimizer={self.optimizer}): 'bp' alone descends, "
                "and needs one. FOA.preset('bp') has the authors'."
            )
        for what, least in (("prompts", 1), ("popsize", 4)):
            if getattr(self, what) < least:
                raise ValueError(f"FOA({what}={getattr(self, what)}): it must be at least {least}.")

    @property
    def cost(self) -> tuple[int, int]:
        """A forward for each candidate; under ``"bp"`` a backward."""
        return {"foa": (self.popsize + 1, 0), "shift": (1, 0), "bp": (1, 1)}[self.variant]

    def configure(self, module: nn.Module) -> nn.Module:
        """Look for the tokens, so that a model without them is refused at once."""
        tokens.find(self, module, self.head)
        return module

    def select(self, module: nn.Module) -> list[str]:
        """Return the scales and shifts of the norm layers under ``"bp"``, nothing else."""
        return select.norm_affine(module) if self.variant == "bp" else []

    def prepare(self, learner: "Learner", batches: Iterable[Tensor]) -> Tensors:
        """Return mean and unbiased deviation of the source's features, over all its images."""
        place = tokens.find(self, learner.module, self.head)
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for x in batches:  # merged one by one, so that the source's size costs no memory
            with torch.no_grad():
                found = _wide(tokens.features(learner.live, x, place)[0])
            share, apart = len(x) / (count + len(x)), found.mean(0) - mean.to(found)
            within = (found - found.mean(0)).square().sum(0)
            squares = squares.to(found) + within + apart.square() * (count * share)
            count, mean = count + len(x), mean.to(found) + share * apart
        if count < 2:
            raise ValueError("FOA takes deviations over source images, but one alone was given.")
        return {"mean": mean, "std": (squares / (count - 1)).sqrt()}

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """Return no history, prompts at random, and the distribution of CMA-ES."""
        place = tokens.find(self, net.module, self.head)
        count = self.prompts if self.variant == "foa" else 0
        tokens.require_reachable(self, net, x, place, count)
        mean = net.constants["mean"]
        history = torch.zeros_like(mean[-place.width :])
        memory = {"history": history, "has_history": history.any()}
        if not count:
            return memory
        zeros = mean.new_zeros(count * place.width)

        def uniform(generator: torch.Generator) -> Tensor:
            share = torch.empty_like(zeros).uniform_(-1, 1, generator=generator)
            return place.bound * share

        return memory | {"best": draw("prompts", uniform)} | evolution.begin(zeros, self.sigma)

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the shifted logits of the best candidate, or of the network as it is."""
        place, source = tokens.find(self, net.module, self.head), net.constants
        state, candidates = memory, source["mean"].new_empty(1, 0)
        if self.variant == "foa":
            state, candidates = self._drawn(net, memory, draw)
        tried = []
        for prompts in candidates:
            found, logits, answer = self._shifted(net, x, memory, place, prompts)
            wide, entropies = _wide(found), entropy(_wide(logits))
            mean, std = wide.mean(0), wide.std(0)
            apart = (std - source["std"]).square() + (mean - source["mean"]).square()
            fitness = self.strength * len(x) / 64 * apart.sum() + entropies.sum()
            if self.variant == "bp":
                fitness = self.strength * apart.mean() + entropies.mean()
            tried.append((fitness, answer, mean[-place.width :].detach()))
        fitness, answers, means = (torch.stack(parts) for parts in zip(*tried, strict=True))
        best, mean = fitness.argmin(keepdim=True), means.mean(0)  # [1]: a scalar would be looked at
        moved = self.rate * memory["history"] + (1 - self.rate) * mean
        remembered = {
            "history": torch.where(memory["has_history"], moved, mean),
            "has_history": torch.ones_like(memory["has_history"]),
        }
        notes = {"fitness": fitness, "best": best, "batch_means": means}
        objective = Objective(logits=answers[best][0].detach(), memory=remembered, notes=notes)
        if self.variant == "bp":
            objective.loss = fitness[0]
        if self.variant == "foa":
            with torch.autocast(x.device.type, enabled=False):
                told = evolution.updated(state, candidates, fitness, self.popsize)
            objective.memory = told | remembered | {"best": candidates[best][0]}
        return objective

    def answering(self, net: Net, memory: Tensors) -> Net:
        """Refuse: prompts and shift are no part of the user's own network."""
        raise ValueError(
            "FOA puts prompts and a shift into the model's forward, which a plain module of yours "
            "does not have. Keep the adapted model."
        )

    def predict(self, net: Net, x: Tensor, memory: Tensors) -> Tensor:
        """Return the shifted logits, by the best prompts of the last batch."""
        tried = self.variant == "foa" and net.batch
        prompts = memory["best"] if tried else memory["history"].new_empty(0)
        place = tokens.find(self, net.module, self.head)
        return self._shifted(net, x, memory, place, prompts)[2]

    def _drawn(self, net: Net, memory: Tensors, draw: Draw) -> tuple[Tensors, Tensor]:
        """Return the distribution, decomposed anew now and then, and the candidates."""
        gap = evolution.constants(len(memory["best"]), self.popsize).gap
        with torch.autocast(memory["best"].device.type, enabled=False):
            due = net.batch and net.batch % gap == 0
            state = evolution.decomposed(memory) if due else memory
            drawn = draw("candidates", lambda g: evolution.sample(state, self.popsize, g))
        return state, torch.cat([drawn, memory["best"][None]])

    def _shifted(
        self, net: Net, x: Tensor, memory: Tensors, place: tokens.Tokens, prompts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return features and logits with these prompts, and the logits of the shifted features."""
        found, logits = tokens.features(net, x, place, prompts.view(-1, place.width))
        shift = net.constants["mean"][-place.width :] - memory["history"]
        shift = shift.where(memory["has_history"], 0.0).to(found.dtype)
        answer: Tensor = net.module.get_submodule(place.head)(found[:, -place.width :] + shift)
        return found, logits, answer


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
