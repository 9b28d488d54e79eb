"""Joint training of a network and a second head that predicts rotations.

Paper: Sun, Wang, Liu, Miller, Efros, Hardt, ICML 2020, arXiv 1909.13231.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.adaptation.twoheads import TwoHeads
from testtime.adaptation.views import turned


class JointStep(NamedTuple):
    """What one step of joint training gave, from before it.

    Args:
        loss: the sum of both cross-entropies.
        logits: of the network ``[B, C]``.
        task_logits: of the second head, for the turned images ``[k * B, 4]``.
    """

    loss: Tensor
    logits: Tensor
    task_logits: Tensor


def rotations(
    x: Tensor, kind: Literal["expand", "rand"], generator: torch.Generator | None = None
) -> Tensor:
    """Return the quarter turns to train with for images ``[B, C, H, H]``.

    Args:
        x: the images.
        kind: ``"expand"``: the batch four times, unturned first ``[4 * B]``, as the published
            models; ``"rand"``: one random turn an image ``[B]``.
        generator: of random turns; none: the global one.
    """
    if kind == "expand":
        return torch.arange(4, device=x.device).repeat_interleave(len(x))
    if kind == "rand":
        return torch.randint(4, (len(x),), generator=generator, device=x.device)
    raise ValueError(f"Rotations of kind {kind!r} are not known: use 'expand' or 'rand'.")


def joint_step(
    model: TwoHeads, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, quarters: Tensor
) -> JointStep:
    """Take one step of joint training, in train mode: both cross-entropies count alike.

    The network's forward comes first, so that BatchNorm layers of the shared part see it first.
    Augment ``x`` before. The paper's recipe for CIFAR-10: SGD with rate 0.1, momentum 0.9 and decay
    5e-4, batches of 128; 150 epochs, a tenth of the rate after 75 and 125.

    Args:
        model: a network and its second head.
        optimizer: of ``model.parameters()``.
        x: images ``[B, C, H, H]`` as the network takes them.
        y: classes ``[B]``.
        quarters: quarter turns ``[k * B]``, from :func:`rotations`.

    Raises:
        ValueError: the turns are not one or several for each image.
    """
    if len(quarters) % len(x):
        raise ValueError(
            f"There are {len(quarters)} rotations for {len(x)} images. Take rotations(x, kind)."
        )
    model.train()
    optimizer.zero_grad()
    logits = model(x)
    task_logits = model.task(turned(x.repeat(len(quarters) // len(x), 1, 1, 1), quarters))
    loss = F.cross_entropy(logits, y) + F.cross_entropy(task_logits, quarters)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return JointStep(loss.detach(), logits.detach(), task_logits.detach())
