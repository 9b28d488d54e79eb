"""Does a self-supervised step help the main task? Their gradients, held against the gain."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Alignment:
    """For each of n images, float64 ``[n]``.

    Args:
        product: inner product of both gradients by the shared weights.
        cosine: of the angle between them.
        gain: by how much the main loss fell when the model adapted to the image.
    """

    product: Tensor
    cosine: Tensor
    gain: Tensor

    @property
    def correlation(self) -> float:
        """Pearson's correlation of product and gain; NaN where one of them does not vary."""
        return float(torch.corrcoef(torch.stack([self.product, self.gain]))[0, 1])

    @property
    def error(self) -> float:
        """Standard error of the correlation if there were none."""
        return 1 / math.sqrt(max(len(self.gain) - 2, 1))


def align(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    self_supervised: Callable[[nn.Module, Tensor], Tensor],
    adapted: Callable[[Tensor], Tensor],
    shared: Sequence[str],
) -> Alignment:
    """Return, image by image, how the gradients of both tasks agree and what adapting gained.

    Where the inner product is positive, a small enough step on the self-supervised loss lowers the
    main one; where it predicts the gain, self-supervision is the reason. Needs labels: it is a
    diagnostic, and nothing adapts by it.

    Args:
        model: returns logits ``[B, C]``; gradients are taken at its weights, which stay.
        images: ``[n, ...]``.
        labels: ``[n]``, int64.
        self_supervised: the loss of the model on one image ``[1, ...]``, a scalar.
        adapted: adapts to one image from the source model and returns its logits, such as
            ``adapt(model, method, episodic="batch")``.
        shared: names of the weights that both tasks share.

    Raises:
        ValueError: there are fewer than three images, not a label each, or nothing is shared.

    Source: Sun et al., "Test-time training with self-supervision for generalization under
    distribution shifts", ICML 2020, theorem 1.
    """
    parameters = dict(model.named_parameters())
    unknown = [name for name in shared if name not in parameters]
    if len(images) < 3 or len(labels) != len(images) or unknown or not shared:
        raise ValueError(
            f"Both tasks are compared on at least three images with a label each and on weights "
            f"that the model has, found {len(images)} images, {len(labels)} labels and "
            f"{f'unknown names {unknown[:3]}' if unknown else f'{len(shared)} names'}."
        )
    flags = [parameters[name].requires_grad for name in shared]
    weights = [parameters[name].requires_grad_() for name in shared]
    rows = []
    try:
        for x, y in zip(torch.split(images, 1), torch.split(labels, 1), strict=True):
            before = F.cross_entropy(model(x), y)
            main = _gradient(before, weights)
            own = _gradient(self_supervised(model, x), weights)
            product = main @ own
            cosine = product / (main.norm() * own.norm())
            with torch.no_grad():
                after = F.cross_entropy(adapted(x), y)
            rows.append(torch.stack([product, cosine, before.detach().double() - after.double()]))
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    return Alignment(*torch.stack(rows).unbind(1))


def _gradient(loss: Tensor, weights: list[Tensor]) -> Tensor:
    grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads]).double()
