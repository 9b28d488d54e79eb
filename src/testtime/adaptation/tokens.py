"""The tokens of a vision transformer: where prompts go in, and what becomes of the class token."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from testtime.adaptation import heads
from testtime.adaptation.core import ADVICE, Method, Net

_CLASS_TOKENS = ("cls_token", "class_token")


@dataclass(frozen=True)
class Tokens:
    """Where a vision transformer can be reached, by the dotted names of modules.

    Args:
        first: the first block, before which prompts go in.
        norms: what the class token passes after each block: the first norm layer of the next one,
            at last the final norm layer.
        head: the classifier, on the class token.
        width: dimensions of a token.
        bound: prompts begin uniform between plus and minus it, as in visual prompt tuning.
    """

    first: str
    norms: tuple[str, ...]
    head: str
    width: int
    bound: float


def find(method: Method, module: nn.Module, head: str | None = None) -> Tokens:
    """Return where the tokens of a model are, by its structure.

    Raises:
        ValueError: it is no vision transformer with a class token, blocks and a final norm layer.
    """
    tokens = [p for n, p in module.named_parameters() if n.rpartition(".")[2] in _CLASS_TOKENS]
    width = tokens[0].shape[-1] if tokens else 0
    blocks = _blocks(module, width)
    inside = {layer for block in blocks.values() for layer in block.modules()}
    outside = [n for n, m in module.named_modules() if _norms(m, width) and m not in inside]
    if not tokens or not blocks or not outside:
        lacks = "class token" if not tokens else "blocks" if not blocks else "final norm layer"
        raise ValueError(
            f"{type(method).__name__} needs a vision transformer whose tokens can be reached, but "
            f"this model has no {lacks} (a parameter {' or '.join(_CLASS_TOKENS)}, a list of equal "
            f"blocks with LayerNorm, and a LayerNorm after them).{ADVICE}"
        )
    firsts = [
        next(f"{name}.{part}" for part, layer in block.named_modules() if _norms(layer, width))
        for name, block in blocks.items()
    ]
    patches = next(
        (m.weight for m in module.modules() if isinstance(m, nn.Conv2d) and len(m.weight) == width),
        torch.empty(width, width),
    )
    return Tokens(
        first=next(iter(blocks)),
        norms=(*firsts[1:], outside[-1]),
        head=heads.find(method, module, head),
        width=width,
        bound=math.sqrt(6 / (patches[0].numel() + width)),
    )


def features(
    net: Net, x: Tensor, tokens: Tokens, prompts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the class token after each block, normalised, and the logits; pure.

    Args:
        net: the network under any weights.
        x: images.
        tokens: where to look.
        prompts: ``[P, D]``, put in after the class token.

    Returns:
        ``[B, blocks * D]``, of which the last ``D`` go into the classifier; ``[B, C]``.
    """
    found: list[Tensor] = []

    def insert(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if prompts is None:
            return None
        own = prompts.to(args[0].dtype).expand(len(args[0]), -1, -1)
        return (torch.cat([args[0][:, :1], own, args[0][:, 1:]], 1), *args[1:])

    norms = {
        net.module.get_submodule(name): lambda _, output: found.append(output[:, 0])
        for name in tokens.norms
    }
    hook = net.module.get_submodule(tokens.first).register_forward_pre_hook(insert)
    try:
        with heads.watching(norms):
            logits = net(x)
    finally:
        hook.remove()
    return torch.cat(found, 1), logits


def require_reachable(method: Method, net: Net, x: Tensor, tokens: Tokens, prompts: int) -> None:
    """Run a batch to see that prompts go in, and that the classifier reads the class token.

    Raises:
        ValueError: the model does not take more tokens, or answers by others than the class token.
    """
    name = type(method).__name__
    heads.require_logits(net, x, tokens.head)
    read = heads.features(net, x, tokens.head)[0]
    try:
        more = torch.zeros(prompts, tokens.width, device=x.device)
        found, _ = features(net, x, tokens, more if prompts else None)
    except RuntimeError as error:
        raise ValueError(
            f"{name} puts {prompts} tokens more into the model, which does not take them "
            f"({str(error).splitlines()[0]}).{ADVICE}"
        ) from error
    plain = features(net, x, tokens)[0][:, -tokens.width :]
    blocks = len(tokens.norms)
    if found.shape[1] != blocks * tokens.width or not torch.equal(plain, read):
        raise ValueError(
            f"{name} shifts the class token after '{tokens.norms[-1]}', but the classifier "
            f"'{tokens.head}' reads something else ({list(read.shape)}), such as the mean of all "
            f"tokens.{ADVICE}"
        )


def _norms(layer: nn.Module, width: int) -> bool:
    return isinstance(layer, nn.LayerNorm) and layer.normalized_shape == (width,)


def _blocks(module: nn.Module, width: int) -> dict[str, nn.Module]:
    """Return the longest list of modules of one kind that each have a norm layer, the innermost."""
    best: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        if not isinstance(child, nn.ModuleList | nn.Sequential):
            continue
        parts = {f"{name}.{part}".lstrip("."): block for part, block in child.named_children()}
        alike = len({type(block) for block in parts.values()}) == 1
        normed = all(any(_norms(m, width) for m in block.modules()) for block in parts.values())
        if alike and normed and len(parts) >= len(best):
            best = parts
    return best
