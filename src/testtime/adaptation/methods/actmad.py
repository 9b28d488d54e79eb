"""ActMAD: the statistics of activations matched to the source's, place by place.

Paper: Mirza, Soneira, Lin, Kozinski, Possegger, Bischof, CVPR 2023, arXiv 2211.12870.
Code that was recorded: jmiemirza/ActMAD.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from testtime.adaptation import select
from testtime.adaptation.core import Draw, Method, Net, Objective, nothing_found
from testtime.adaptation.heads import watching
from testtime.adaptation.optim import SGD, Adam, Tensors

if TYPE_CHECKING:
    from testtime.adaptation.learner import Learner

Moments = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ActMAD(Method):
    """Align mean and variance of what norm layers put out with those of the source data.

    With ``m_l, v_l`` the mean and unbiased variance over the batch of layer ``l``'s outputs, at
    each channel and place, and ``m_l^s, v_l^s`` the same on source data::

        loss = 1/2 sum_l (mean |m_l - m_l^s| + mean |v_l - v_l^s|)

    All weights descend; BatchNorm normalises with its running statistics, which stay. The answer is
    from after the update. Nothing is asked of the model's outputs: regression and detection fit.
    State: the optimiser's. Constants: the moments, averaged over source batches.

    Fails in small batches (one image has no variance), with images of another size than the
    source's, and where classes are distributed otherwise than in the source.

    Changed from the official code: every kind of norm layer is matched, dropout and the like stay
    off, and outputs are matched as they left the layer: there an in-place ReLU has overwritten
    them. Test images are adapted on as they are, each batch is answered once. Preset ``official``:
    BatchNorm2d, train mode, overwritten outputs; ``cifar100``, ``imagenet``: their learning rates.

    Args:
        layers: the kinds of layers whose outputs are matched.
        overwritten: look at outputs when the whole forward is done, in-place changes included.
        train: run all but the BatchNorm layers in train mode, dropout included.
    """

    optimizer: SGD | Adam | None = SGD(lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    layers: tuple[type[nn.Module], ...] = select.NORMS
    overwritten: bool = False
    train: bool = False

    adapts = "all weights, by the outputs of normalisation layers"
    answers: Literal["before", "after"] = "after"
    needs_source = True
    smallest_batch = 2
    cost = (2, 1)
    presets = {  # noqa: RUF012
        "official": {"layers": (nn.BatchNorm2d,), "overwritten": True, "train": True},
        "cifar100": {
            "optimizer": SGD(lr=0.001, momentum=0.9, nesterov=True, weight_decay=5e-4),
        },
        "imagenet": {
            "optimizer": SGD(lr=0.00025, momentum=0.9, nesterov=True, weight_decay=5e-4),
        },
    }

    def configure(self, module: nn.Module) -> nn.Module:
        """Keep BatchNorm layers in eval mode, in whichever mode the network is."""
        if not select.layers(module, self.layers):
            raise nothing_found(self, module)
        for name in select.layers(module, select.BATCH_NORMS):
            module.get_submodule(name).register_forward_pre_hook(_in_eval_mode)
        return module

    def select(self, module: nn.Module) -> list[str]:
        """Return all parameters."""
        return select.everything(module)

    def prepare(self, learner: "Learner", batches: Iterable[Tensor]) -> Tensors:
        """Return the moments of each layer, averaged over the source batches."""
        total: Moments = []
        for count, x in enumerate(batches, 1):  # noqa: B007 - there is one, or it was refused
            if len(x) < 2:
                raise ValueError(
                    "ActMAD takes variances over source batches, but one has a single image. Use "
                    "batches of at least 2, such as by drop_last=True."
                )
            with torch.no_grad():
                moments = self._moments(learner.live, x)[1]
            total = total or [(torch.zeros_like(mean), torch.zeros_like(v)) for mean, v in moments]
            _require_like(moments, total)
            total = [(m + t, v + u) for (m, v), (t, u) in zip(moments, total, strict=True)]
        means = {f"mean.{k}": mean / count for k, (mean, _) in enumerate(total)}
        return means | {f"var.{k}": var / count for k, (_, var) in enumerate(total)}

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return how far the batch's moments are from the source's."""
        logits, moments = self._moments(net.train() if self.train else net, x)
        source = net.constants
        _require_like(moments, [(source[f"mean.{k}"],) * 2 for k in range(len(source) // 2)])
        pairs = list(enumerate(moments))
        mean = torch.stack([(m - source[f"mean.{k}"]).abs().mean() for k, (m, _) in pairs]).sum()
        var = torch.stack([(v - source[f"var.{k}"]).abs().mean() for k, (_, v) in pairs]).sum()
        notes = {"logits": logits, "mean_loss": mean, "var_loss": var}
        return Objective(loss=0.5 * (mean + var), notes=notes)

    def _moments(self, net: Net, x: Tensor) -> tuple[Tensor, Moments]:
        """Return the logits, and mean and variance of every call of a layer, in order."""
        outputs: list[Tensor] = []

        def keep(_: object, output: Tensor) -> None:
            outputs.append(output if self.overwritten else output.clone())

        layers = select.layers(net.module, self.layers)
        with watching({net.module.get_submodule(name): keep for name in layers}):
            logits = net(x)
        wide = [output.to(torch.promote_types(output.dtype, torch.float32)) for output in outputs]
        return logits, [(output.mean(0), output.var(0)) for output in wide]


def _in_eval_mode(layer: nn.Module, args: object) -> None:
    layer.eval()


def _require_like(moments: Moments, source: Moments) -> None:
    shapes = [[list(mean.shape) for mean, _ in held] for held in (moments, source)]
    if shapes[0] != shapes[1]:
        new, old = next(
            (pair for pair in zip(*shapes, strict=False) if pair[0] != pair[1]),
            tuple(f"{len(held)} times" for held in shapes),
        )
        raise ValueError(
            f"ActMAD matches activations place by place, but norm layers put out {new} here and "
            f"{old} on source data. Give all images the size of the first source batch."
        )
