"""MEMO: marginal entropy minimization with one test point.

Paper: Zhang, Levine, Finn, NeurIPS 2022, arXiv 2110.09506.
Code that was recorded: zhangmarvin/memo.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from testtime.adaptation import select, views
from testtime.adaptation.batchnorm import batch_norms, normalise_with
from testtime.adaptation.core import Draw, Method, Net, Objective
from testtime.adaptation.objectives import marginal_entropy
from testtime.adaptation.optim import SGD, Adam, AdamW, Tensors
from testtime.adaptation.views import pillow


@dataclass(frozen=True)
class MEMO(Method):
    """Make the views of an image agree, and be sure: adapt to one image, answer it, start afresh.

    With predictions ``p_v`` of ``V`` augmented views of an image (equations 1 and 2)::

        all weights descend  H(mean_v p_v),  ``steps`` times, each with new views
        answer = the plain image under the adapted weights

    Every image is an episode of its own unless ``adapt(episodic=)`` says otherwise; then the loss
    is the mean over the images of a batch, whose views share their random numbers. BatchNorm
    normalises with ``N / (N + 1)`` of the source's statistics and ``1 / (N + 1)`` of the mean and
    unbiased variance of what is forwarded, through which no gradient goes. State: the optimiser's.

    Fails where several things are in one image (the views agree on the wrong one), and with
    BatchNorm without a prior. Slow: ``V`` forwards and backwards an image and step, and one more.

    Changed from the official code: AugMix is torch, on the device, between 8-bit levels (1 off at
    most for one operation, but where a threshold cuts; a test says so), and what lies beyond a
    moved image is grey; every BatchNorm has the prior; the optimiser starts afresh with the
    weights. Preset ``official``: AugMix in 8 bits by Pillow, with a dark red border; BatchNorm
    without a prior; AdamW's moments carry over from image to image. ``imagenet``: its rate, 64
    views and prior 16; ``"imagenet", "adamw"``: for RVT and ResNeXt-101. For ImageNet-R and A
    let ``logits=`` cut the classes.

    Args:
        views: ``V``.
        prior: ``N`` for BatchNorm layers; none: the source's statistics alone.
        crop: ``"padded"`` by 4 pixels, as for CIFAR, or 8 to 100 % of an image, ``"resized"``.
        augment: AugMix by ``"torch"`` or by ``"pillow"``, which runs one image after another.
        layers: the kinds of BatchNorm layers with the prior.
    """

    optimizer: SGD | Adam | None = SGD(lr=0.005)
    views: int = 32
    prior: int | None = 16
    crop: Literal["padded", "resized"] = "padded"
    augment: Literal["torch", "pillow"] = "torch"
    layers: tuple[type[nn.Module], ...] = select.BATCH_NORMS

    adapts = "all weights and biases"
    needs = "colour images"
    tested = "single images of corruptions and natural shifts, each from the start"
    answers = "after"
    episodic = "sample"
    presets = {  # noqa: RUF012
        "official": {
            "prior": None,
            "augment": "pillow",
            "layers": (nn.BatchNorm2d,),
            "survives": ("slots",),
        },
        "imagenet": {
            "optimizer": SGD(lr=0.00025),
            "views": 64,
            "prior": 16,
            "crop": "resized",
        },
        "adamw": {"optimizer": AdamW(lr=1e-5, weight_decay=0.01)},
    }

    def __post_init__(self) -> None:
        """Check the words and the counts."""
        super().__post_init__()
        known = {"crop": ("padded", "resized"), "augment": ("torch", "pillow")}
        for option, words in known.items():
            if getattr(self, option) not in words:
                raise ValueError(
                    f"MEMO({option}={getattr(self, option)!r}) is not known: use one of {words}."
                )
        if self.views < 1 or (self.prior is not None and self.prior < 0):
            raise ValueError(
                f"MEMO(views={self.views}, prior={self.prior}): views are at least 1, the prior at "
                "least 0, or none for the source's statistics alone."
            )

    @property
    def cost(self) -> tuple[int, int]:
        """Every view forward and backward, and the image itself forward."""
        return (self.views + 1, self.views)

    @property
    def looks(self) -> int:
        """None; Pillow works on the host."""
        return int(self.augment == "pillow")

    def configure(self, module: nn.Module) -> nn.Module:
        """Hook the prior into the BatchNorm layers."""
        if self.prior is not None:
            for layer in batch_norms(module, self.layers).values():
                normalise_with(layer, self._mixed, keep=False)
        return module

    def select(self, module: nn.Module) -> list[str]:
        """Return all parameters."""
        return select.everything(module)

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """Return no memory; refuse what cannot be augmented."""
        views.require_images(net.images(x), type(self).__name__)
        return {}

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the entropy of the mean prediction over views; the answer comes after."""
        seen = draw("views", partial(self._views, net, x))
        logits = self.predict(net, seen.flatten(0, 1), memory)
        views.require_rows(logits, type(self).__name__)
        logits = logits.view(*seen.shape[:2], -1)
        return Objective(loss=marginal_entropy(logits).mean(), notes={"view_logits": logits})

    def _views(self, net: Net, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return inputs ``[V, B, 3, H, W]``."""
        images = net.images(x)
        drawn = views.draw_mixtures(images, self.views, self.crop, generator)
        chains = pillow.chains if self.augment == "pillow" else views.mixture_chains
        plain, ends = chains(images, drawn)
        return views.mixed(net.inputs(plain), net.inputs(ends), drawn)

    def _mixed(
        self, layer: _BatchNorm, mean: Tensor, var: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        assert self.prior is not None
        assert layer.running_mean is not None
        assert layer.running_var is not None
        source = self.prior / (self.prior + 1)
        return (
            source * layer.running_mean + (1 - source) * mean.detach(),
            source * layer.running_var + (1 - source) * var.detach(),
        )
