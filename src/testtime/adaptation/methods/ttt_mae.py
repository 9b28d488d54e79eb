"""TTT-MAE: test-time training with a masked autoencoder.

Paper: Gandelsman, Sun, Chen, Efros, NeurIPS 2022, arXiv 2209.07522.
Code that was recorded: yossigandelsman/test_time_training_mae.
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testtime.adaptation.core import ADVICE, Draw, Method, Net, Objective
from testtime.adaptation.methods._low_rank import put_low_rank
from testtime.adaptation.optim import SGD, Adam, Tensors

if TYPE_CHECKING:
    from testtime.adaptation.learner import Learner

# What each choice of `trains` changes, by the names of an autoencoder's parameters.
_TRAINS = {
    "encoder": r"(cls_token|mask_token)$|(patch_embed|blocks|norm)\.",
    "all": r"(cls_token|mask_token)$|(patch_embed|blocks|norm|decoder_[a-z]+)\.",
    "norms": r"(blocks\.\d+\.norm[12]|norm)\.",
    "low-rank": r"blocks\..*\.(down|up)$",
}


@dataclass(frozen=True)
class TTTMAE(Method):
    """Reconstruct hidden patches of each image for some steps, then classify the whole image.

    With encoder ``f``, decoder ``g``, head ``h``, masks ``m`` drawn anew at each step, and the
    targets ``t`` of hidden patches::

        f descends  mean over masks and hidden patches of |g(f(x under m)) - t|^2
        answer      h(f(x)), after the steps

    Labels, other images and statistics of the test set play no part, and ``h`` never changes. The
    authors adapt to every image alone, from the stored weights: ``adapt(..., episodic="sample")``.
    Otherwise weights and the optimiser's state carry over from batch to batch, and the images of a
    batch share one loss. State: the weights that train and the optimiser's.

    Fails where the encoder has drifted from what the decoder expects (fine-tuning), with the wrong
    target, and at very high mask ratios. Slow: 20 steps of 128 masks cost 1850 forwards.

    Changed from the official code: masks restart from the seed at every episode, so that an answer
    does not depend on the images before; nothing runs in train mode, which in its networks changes
    nothing. Presets: ``official``, one stream of masks; ``paper``, that with weight decay.

    Args:
        copies: masks of each image in a step.
        mask_ratio: share of patches that are hidden.
        trains: the ``"encoder"`` with class and mask token, ``"all"`` of encoder and decoder, the
            encoder's ``"norms"``, or ``"low-rank"`` additions to its linear layers. Position tables
            and the head never change.
        tokens: let class and mask token train in the first two.
        rank: of the low-rank additions.
        accumulate: gradients of so many such sets of masks make one step, in the memory of one.
        crops: every mask has a random crop of its own, 20 to 100 % of the image and flipped or
            not, in the place of the image.
        restarts: the optimiser begins anew at every batch, also where weights carry over.
        held_out: stop when the reconstruction of this share of the hidden patches, kept out of the
            loss, gets worse. Costs their part of the loss and one look from the host a step; saves
            the steps that are left. 0: take all steps.
        normalised: what the decoder predicts; none: what the network says of itself.
        watch: note the answer before every step, one forward each.
    """

    optimizer: SGD | Adam | None = SGD(lr=5e-3, momentum=0.9)
    steps: int = 20
    copies: int = 128
    mask_ratio: float = 0.75
    trains: Literal["encoder", "all", "norms", "low-rank"] = "encoder"
    tokens: bool = True
    rank: int = 4
    accumulate: int = 1
    crops: bool = False
    restarts: bool = False
    held_out: float = 0.0
    normalised: bool | None = None
    watch: bool = False

    name = "ttt-mae"
    adapts = "the encoder of a masked autoencoder"
    answers = "after"
    presets = {  # noqa: RUF012
        "official": {"survives": ("generator",)},
        "paper": {
            "survives": ("generator",),
            "optimizer": SGD(lr=5e-3, momentum=0.9, weight_decay=0.2),
        },
    }

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        counts = {"copies": self.copies, "accumulate": self.accumulate, "rank": self.rank}
        if low := {k: v for k, v in counts.items() if v < 1}:
            raise ValueError(f"TTTMAE: {low} must be at least 1.")
        if not 0 < self.mask_ratio < 1 or not 0 <= self.held_out < 1:
            raise ValueError(
                f"TTTMAE(mask_ratio={self.mask_ratio}, held_out={self.held_out}) are shares: some "
                "patches must be hidden, some seen, and not all of the hidden ones held out."
            )
        if self.trains not in _TRAINS:
            raise ValueError(
                f"TTTMAE(trains={self.trains!r}) is not known: choose one of {', '.join(_TRAINS)}."
            )
        if self.held_out and self.accumulate > 1:
            raise ValueError("TTTMAE(held_out=, accumulate=): choose one of them.")

    @property
    def cost(self) -> tuple[int, int]:
        """Every mask goes forward and back, in the encoder with its visible patches alone."""
        masks = self.copies * self.accumulate
        return (masks + self.watch, masks)

    @property
    def looks(self) -> int:
        """Stopping looks at a loss in every step."""
        return self.steps if self.held_out else 0

    def configure(self, module: nn.Module) -> nn.Module:
        """Set the target, put in what is of low rank, and reconstruct one grey image to try it."""
        _, mae, _ = _autoencoder(module)
        declared = mae.normalised
        if self.normalised is not None and declared not in (None, self.normalised):
            raise ValueError(
                f"TTTMAE(normalised={self.normalised}), but the network's decoder was trained with "
                f"normalised={declared}. Leave it out."
            )
        if self.normalised is not None:
            mae.normalised = self.normalised
        if self.trains == "low-rank":
            put_low_rank(mae.blocks, self.rank)
        weight = next(mae.parameters())
        grey = torch.zeros(1, mae.channels, *mae.image, dtype=weight.dtype, device=weight.device)
        order = torch.arange(mae.patches, device=weight.device).unsqueeze(0)
        with torch.no_grad():
            mae.reconstruct(grey, order, self.mask_ratio)
        return module

    def select(self, module: nn.Module) -> list[str]:
        """Return the names of what trains."""
        prefix = _autoencoder(module)[0]
        names = [name.removeprefix(prefix) for name, _ in module.named_parameters()]
        chosen = [name for name in names if re.match(_TRAINS[self.trains], name)]
        if not self.tokens:
            chosen = [name for name in chosen if not name.endswith("_token")]
        return [prefix + name for name in chosen]

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """Return which patches are held out, and the loss on them; nothing without stopping."""
        if not self.held_out:
            return {}
        patches = _autoencoder(net.module)[1].patches
        hidden = patches - int(patches * (1 - self.mask_ratio))
        count = min(max(1, round(self.held_out * hidden)), hidden - 1)
        noise = draw("held_out", partial(_uniform, (patches,)))
        return {
            "held_out": noise.argsort().argsort() < count,
            "held_loss": x.new_full((), math.inf),
        }

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the reconstruction loss of the images under fresh masks."""
        notes = {}
        if self.watch:
            with torch.no_grad():
                notes["logits"] = self.predict(net, x, memory)
        if self.accumulate > 1:
            return self._accumulated(net, x, draw, notes)
        noise, images = self._drawn(net, x, draw)
        if not self.held_out:
            return Objective(loss=self._reconstructed(net, noise, images).loss, notes=notes)
        held = memory["held_out"]
        # Noise of 1 and more is behind all other: patches that are held out are never seen.
        made = self._reconstructed(net, noise + held.to(noise.dtype), images)
        errors = (made.prediction - made.target).square().mean(-1)
        trained = made.masking.mask & ~held
        held_loss = ((errors * held).sum() / (held.sum() * len(errors))).detach().to(x.dtype)
        best = memory["held_loss"] if net.inner else math.inf
        return Objective(
            loss=(errors * trained).sum() / trained.sum(),
            when=held_loss < best,
            memory={"held_loss": held_loss},
            notes={**notes, "held_loss": held_loss},
        )

    def step(self, learner: "Learner", x: Tensor) -> Tensor:
        """Take the steps on a batch, or as many as the patches that are held out allow."""
        if self.restarts and not learner.many:
            learner.work.slots = learner.start.slots
        if not self.held_out:
            return learner.default_step(x)
        for learner.inner in range(self.steps):
            objective, grads = learner.gradient(
                lambda net, x, memory: self.loss(net, x, memory, learner.draw)
            )
            learner.note(**objective.notes)
            learner.remember(objective.memory)
            assert objective.when is not None
            if not bool(objective.when):
                break
            learner.descend(grads)
        for _ in range(learner.inner + 1, self.steps):  # as many notes for every image
            learner.note(
                **{name: held[0].new_tensor(math.nan) for name, held in learner.notes.items()}
            )
        return learner.answer()

    def _accumulated(self, net: Net, x: Tensor, draw: Draw, notes: Tensors) -> Objective:
        """Return a loss with the mean gradient of several sets of masks, each freed at once."""
        total: Tensors = {}
        losses = []
        for part in range(self.accumulate):
            noise, images = self._drawn(net, x, draw, f".{part}")

            def one(net: Net, noise: Tensor = noise, images: Tensor = images) -> Any:
                loss = self._reconstructed(net, noise, images).loss
                return loss, loss.detach()

            grads, loss = net.gradient(one)
            losses.append(loss)
            total = {k: g + total[k] if total else g for k, g in grads.items()}
        # A function of the weights that has this gradient, and the value of the mean loss.
        slope = sum((net.weights[k] * (g / self.accumulate)).sum() for k, g in total.items())
        assert isinstance(slope, Tensor)
        each = torch.stack(losses)
        return Objective(loss=each.mean() + slope - slope.detach(), notes={**notes, "losses": each})

    def _drawn(self, net: Net, x: Tensor, draw: Draw, part: str = "") -> tuple[Tensor, Tensor]:
        """Return the noise that orders patches, a row a mask, and the images under the masks."""
        rows = self.copies * x.shape[0]
        images = draw(f"views{part}", partial(_crops, x, self.copies)) if self.crops else x
        patches = _autoencoder(net.module)[1].patches
        return draw(f"noise{part}", partial(_uniform, (rows, patches))), images

    def _reconstructed(self, net: Net, noise: Tensor, images: Tensor) -> Any:
        order = noise.argsort(dim=1, stable=True)  # equal noise: equal masks on every device
        return net.run(partial(_reconstruct, ratio=self.mask_ratio), order, images)


def _reconstruct(module: nn.Module, order: Tensor, images: Tensor, ratio: float) -> Any:
    _, mae, before = _autoencoder(module)
    return mae.reconstruct(before(images), order, ratio)


def _autoencoder(module: nn.Module) -> tuple[str, Any, nn.Module]:
    """Return what begins the names of the autoencoder's parameters, itself, and what is before it.

    It is the module, or the last of a sequence (behind a normalisation, say).
    """
    prefix, mae = "", module
    before: nn.Module = nn.Sequential()
    if isinstance(module, nn.Sequential) and len(module):
        prefix, before, mae = f"{list(module._modules)[-1]}.", module[:-1], module[-1]
    if not callable(getattr(mae, "reconstruct", None)):
        raise ValueError(
            "TTTMAE needs a masked autoencoder: a network with reconstruct(), patches, image and "
            "channels, such as load_mae() of testtime.models.mae returns, alone or last in an "
            f"nn.Sequential; but found {type(mae).__name__}.{ADVICE}"
        )
    return prefix, mae, before


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def _crops(x: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """Return ``copies`` random crops of each image, enlarged to its size and flipped or not."""
    numbers = _uniform((5, copies * x.shape[0]), generator).to(x.dtype)
    share, shape, down, right, side = numbers.unbind()
    area, aspect = 0.2 + 0.8 * share, (4 / 3) ** (2 * shape - 1)
    height, width = (a.sqrt().clamp(max=1) for a in (area / aspect, area * aspect))
    flip = torch.where(side < 0.5, -1, 1)
    zero = torch.zeros_like(share)
    # From places in the crop to places in the image, both from -1 to 1.
    across = torch.stack([flip * width, zero, (1 - width) * (2 * right - 1)], dim=1)
    along = torch.stack([zero, height, (1 - height) * (2 * down - 1)], dim=1)
    images = x.repeat_interleave(copies, dim=0)
    grid = F.affine_grid(torch.stack([across, along], 1), [*images.shape], align_corners=False)
    return F.grid_sample(images, grid, "bicubic", "reflection", align_corners=False)
