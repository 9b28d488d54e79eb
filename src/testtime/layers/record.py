"""What happens in the inner loops of a model, collected on request."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class Inner(NamedTuple):
    """One call of one layer."""

    losses: Tensor  # [B, H, T + 1]: before each step on its tokens, at last on all tokens
    state: dict[str, Tensor] | None  # the adapted weights, [B, H, ...], where they are wanted


class Recorded(nn.Module):
    """A layer with an inner loop."""

    # What is called at each forward, while somebody listens.
    inner_record: "list[Inner] | None" = None
    inner_state: bool = False


@contextmanager
def record_inner(model: nn.Module, state: bool = False) -> Iterator[dict[str, list[Inner]]]:
    """Collect the inner losses of every layer and step for as long as the context lasts.

    >>> import torch
    >>> from testtime.models import ViT
    >>> model = ViT("mttt-mlp", image_size=32, patch_size=8, depth=2)
    >>> with record_inner(model) as record:
    ...     logits = model(torch.rand(2, 3, 32, 32))
    >>> losses = record["blocks.1.attn"][0].losses
    >>> losses.sum(1).mean(0).shape  # as the authors log them: T + 1 numbers a layer
    torch.Size([2])

    Losses come without gradient and cost about a forward of the learner a step. Not for compiled
    models, which would have to be compiled again.

    Args:
        model: a layer, or a module that holds layers with inner loops.
        state: whether to keep the adapted weights too, with their gradient.

    Raises:
        ValueError: no layer of the model has an inner loop.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Recorded)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer with an inner loop; give a model with MTTT or "
            "ViTTT layers."
        )
    record: dict[str, list[Inner]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.inner_record, layer.inner_state = record[name], state
    try:
        yield record
    finally:
        for layer in layers.values():
            layer.inner_record, layer.inner_state = None, False
