"""How many operations a forward takes, by the formulas that papers count with."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def count_flops(model: nn.Module, image_size: int = 224, in_chans: int = 3) -> int:
    """Return the FLOPs of a forward on one image; a multiply and an add are two.

    Dense layers, convolutions and mixing layers count, entry-wise work does not. A mixing layer is
    counted by its own formula: that of the method, whatever form it runs in, so that recomputation
    is no progress. It runs on a copy without data: nothing of the model is touched.

    Args:
        model: takes images ``[B, C, H, W]``.
        image_size: H and W.
        in_chans: C.

    Raises:
        TypeError: the model holds an attention whose formula is not known here.
    """
    model = copy.deepcopy(model).to("meta").eval()
    total = 0

    def mixing(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += module.flops(inputs[0].shape[1])

    def product(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += 2 * output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            total += 2 * output.numel() * module.weight[0].numel()

    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if callable(getattr(module, "flops", None)):
            module.register_forward_hook(mixing)
            inside.update(module.modules())
        elif isinstance(module, nn.MultiheadAttention) or type(module).__name__ == "Attention":
            raise TypeError(
                f"'{name}' is {type(module).__name__}, whose products are not counted here; use "
                "layers.SoftmaxAttention."
            )
        else:
            module.register_forward_hook(product)
    with torch.no_grad():
        model(torch.empty(1, in_chans, image_size, image_size, device="meta"))
    return total
