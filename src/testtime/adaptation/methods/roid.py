"""ROID: weight ensembling, diversity weighting and prior correction for any stream.

Paper: Marsden, Döbler, Yang, WACV 2024, arXiv 2306.00650.
Code that was recorded: mariodoebler/test-time-adaptation.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testtime.adaptation import views
from testtime.adaptation.batchnorm import batch_norms, use_batch_statistics
from testtime.adaptation.core import Draw, Net, Objective, Settled
from testtime.adaptation.methods._norm import NormMethod
from testtime.adaptation.objectives import cross_entropy, entropy, likelihood_ratio
from testtime.adaptation.optim import SGD, Adam, Tensors


@dataclass(frozen=True)
class ROID(NormMethod):
    """Descend a weighted likelihood ratio, stay near the source, correct the answer by its prior.

    With predictions ``p_i`` of a batch, their running mean ``m``, and ``<>`` a batch scaled to
    [0, 1] by its least and largest value::

        d_i = <1 - cos(m, p_i)>       c_i = <-H(p_i)>                        (diversity, certainty)
        w_i = exp(d_i * c_i / temperature)  if d_i >= mean(d),  else 0
        t descends  sum_i w_i * (slr(p_i) + sce(p_i, p'_i)) / B       (p' of an augmented view)
        t = rate * t + (1 - rate) * source                            (weight ensembling)
        m = mean_rate * m + (1 - mean_rate) * mean(p)
        answer = z * s,   s = (mean(p) + g) / (1 + g * C),   g = max(1/B, 1/C) / max(mean(p))

    ``slr`` is the soft likelihood ratio ``-sum_k q_k log(q_k / (1 - q_k))``, ``q = min(p, 0.99)``;
    ``sce`` the symmetric cross-entropy. The answer is from before the update; ``predict()`` does
    without the prior, which is that of a batch. State: the optimiser's and ``m``.

    Fails where logits of frequent classes are negative (``s`` then works the wrong way round), and
    with small batches, whose prior is noise. Where a head has BatchNorm1d, a batch of which one
    image alone has weight is refused. Where all ``d`` or all ``c`` are equal, they count as 1.

    Changed from the official code: every kind of norm layer adapts, every BatchNorm by the batch's
    statistics, the loss is divided by the images there are; the consistency also works without
    weights. Preset ``official``: BatchNorm1d keeps running statistics beside, which move unused,
    and serve where an image comes alone; InstanceNorm and BatchNorm3d stay; batches count as 200
    images; the window of ``adapt(window=W)`` outlives a reset (there, that code has ``batch_size``
    1). ``imagenet``: its rate, batches of 64.

    Args:
        temperature: of the weights.
        rate: share of the present weights that stays at every step.
        mean_rate: share of the running mean that stays.
        weighting: by diversity and certainty; without it every image has weight 1, and ``m`` stays.
        consistency: the second term of the loss, and its second forward of the images with weight.
        prior: correct the answer.
        batch_size: what the loss is divided by; none: the number of images in the batch.
        moving: kinds of BatchNorm layers whose running statistics move beside the batch's.
    """

    optimizer: SGD | Adam | None = Adam(lr=1e-3)
    temperature: float = 1 / 3
    rate: float = 0.99
    mean_rate: float = 0.9
    weighting: bool = True
    consistency: bool = True
    prior: bool = True
    batch_size: int | None = None
    moving: tuple[type[nn.Module], ...] = ()

    needs = "colour images"
    tested = "shifts one after another or mixed, in any order of classes; batches, single images"
    presets = {  # noqa: RUF012
        "official": {
            "layers": (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm),
            "moving": (nn.BatchNorm1d,),
            "batch_size": 200,
            "survives": ("window",),
        },
        "imagenet": {
            "optimizer": SGD(lr=0.00025, momentum=0.9, nesterov=True),
            "batch_size": 64,
        },
    }

    def __post_init__(self) -> None:
        """Check the rates and the size of a batch."""
        super().__post_init__()
        for what in ("rate", "mean_rate"):
            if not 0 <= getattr(self, what) <= 1:
                raise ValueError(
                    f"ROID({what}={getattr(self, what)}): it is a share between 0 and 1."
                )
        if self.temperature <= 0 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(
                f"ROID(temperature={self.temperature}, batch_size={self.batch_size}): the "
                "temperature is above 0, a batch has at least one image (none: as it comes)."
            )

    @property
    def smallest_batch(self) -> int:
        """Two where images are weighted against each other."""
        return 2 if self.weighting else 1

    @property
    def cost(self) -> tuple[int, int]:
        """Twice with views, once without."""
        return (2, 2) if self.consistency else (1, 1)

    @property
    def looks(self) -> int:
        """Two with views: in which order do their colours change? which images have weight?"""
        return 2 if self.consistency else 0

    def configure(self, module: nn.Module) -> nn.Module:
        """Make BatchNorm layers normalise with the batch, but those in whose train mode they do."""
        if self.statistics == "batch":
            kinds = tuple(kind for kind in self.layers if kind not in self.moving)
            use_batch_statistics(module, kinds)
        return module

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """Return the running mean of predictions, uniform."""
        if self.consistency:
            views.require_images(net.images(x), type(self).__name__)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return {"mean": x.new_full((net.classes,), 1 / net.classes, dtype=dtype)}

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the weighted loss, the logits by their prior, and the mean moved towards them."""
        network = self.answering(net, memory)
        logits = network(x)
        views.require_rows(logits, type(self).__name__)
        mean, probs = memory["mean"], logits.detach().softmax(1).to(memory["mean"].dtype)
        keep, weights = self._weights(mean, probs, entropy(logits.detach()))

        loss = (weights * likelihood_ratio(logits)).sum()
        if self.consistency:
            view = draw("views", partial(self._view, net, x))
            # Batch statistics see who is there, so those without weight must not be.
            kept = keep.nonzero().squeeze(1) if net.couples else slice(None)
            other, own = network(view[kept]), logits[kept]
            gaps = cross_entropy(own, other) + cross_entropy(other, own)
            loss = loss + (weights[kept] * gaps).sum() / 2

        moved = self.mean_rate * mean + (1 - self.mean_rate) * probs.mean(0)
        return Objective(
            loss=loss / (self.batch_size or x.shape[0]),
            logits=(logits * _smoothed(probs)).to(logits.dtype) if self.prior else logits,
            memory={"mean": moved if self.weighting else mean},
            notes={"keep": keep, "weights": weights, "logits": logits},
        )

    def settle(self, net: Net, memory: Tensors, draw: Draw) -> Settled:
        """Return the weights a little nearer to the source's."""
        start = net.start
        return Settled(
            {k: self.rate * w + (1 - self.rate) * start[k] for k, w in net.weights.items()}
        )

    def answering(self, net: Net, memory: Tensors) -> Net:
        """Return the network in the modes that it adapts in."""
        return net.train() if self.train else net.train(batch_norms(net.module, self.moving))

    def predict(self, net: Net, x: Tensor, memory: Tensors) -> Tensor:
        """Return the logits; for one row, which has no statistics, with moving ones."""
        return net(x) if self.moving and len(x) == 1 else super().predict(net, x, memory)

    def _weights(self, mean: Tensor, probs: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
        """Return which images have weight, and the weights ``[B]``."""
        if not self.weighting:
            return torch.ones_like(entropies, dtype=torch.bool), torch.ones_like(entropies)
        diversity = _scaled(1 - F.cosine_similarity(mean.unsqueeze(0), probs))
        certainty = _scaled(-entropies)
        keep = ~(diversity < diversity.mean())  # so that a NaN is kept, and the batch skipped
        return keep, torch.where(keep, (diversity * certainty / self.temperature).exp(), 0)

    def _view(self, net: Net, x: Tensor, generator: torch.Generator) -> Tensor:
        images = net.images(x)
        orders = views.draw_orders(images, 1, generator)
        drawn = views.draws(images, orders, generator, blur=False)
        return net.inputs(views.views(images, drawn, padding="reflect")[0])


def _scaled(values: Tensor) -> Tensor:
    """Return values from 0 to 1 by the least and the largest; all 1 where these are equal."""
    low, high = values.amin(), values.amax()
    return torch.where(high == low, 1, (values - low) / torch.where(high == low, 1, high - low))


def _smoothed(probs: Tensor) -> Tensor:
    """Return the prior of the classes in a batch of predictions, smoothed."""
    rows, classes = probs.shape
    prior = probs.mean(0)
    smoothing = max(1 / rows, 1 / classes) / prior.amax()
    return (prior + smoothing) / (1 + smoothing * classes)
