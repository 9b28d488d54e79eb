"""How many operations a forward takes, by the formulas that papers count with."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def count_flops(model: nn.Module, image_size: int = 224, in_chans: int = 3) -> int:
    """Return the FLOPs of a forward on one image; a multiply and an add are two.

    Dense layers, convolutions and mixing layers count, entry-wise work does not. A mixing layer is
    counted by its own formula, that of the method in whatever form it runs, so that recomputation
    is no progress. A copy without data does the forward: nothing of the model is touched.

    >>> from testtime.models import ViT
    >>> round(count_flops(ViT("mttt-linear", dim=192)) / 1e9, 2)
    2.49

    Args:
        model: takes images ``[B, C, H, W]``; its mixing layers have ``flops(tokens)``.
        image_size: H and W.
        in_chans: C.

    Raises:
        TypeError: the model holds an attention whose formula is not known here.
    """
    model = copy.deepcopy(model).to("meta").eval()
    counted: list[int] = []

    def product(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        counted.append(2 * output.numel() * weight[0].numel())

    for name, module in list(model.named_modules()):
        if callable(flops := getattr(module, "flops", None)):
            model.set_submodule(name, _Counter(flops, counted))
        elif isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(product)
        elif isinstance(module, nn.MultiheadAttention) or type(module).__name__ == "Attention":
            raise TypeError(
                f"'{name}' is {type(module).__name__}, whose products are not counted here; take "
                "layers.SoftmaxAttention in its place."
            )
    with torch.no_grad():
        model(torch.empty(1, in_chans, image_size, image_size, device="meta"))
    return sum(counted)


class _Counter(nn.Module):
    """Stands in for a mixing layer: tokens ``[B, N, C]`` go through, and N is noted."""

    def __init__(self, flops: Callable[[int], int], counted: list[int]) -> None:
        super().__init__()
        self._flops, self._counted = flops, counted

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._counted.append(self._flops(x.shape[1]))
        return x
