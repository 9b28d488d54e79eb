"""Many samples at once, each with weights of its own: ``vmap`` around a method's functions."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from testtime.adaptation.calls import Call, Output, chosen, tree
from testtime.adaptation.checks import Found, named
from testtime.adaptation.core import Net, Objective
from testtime.adaptation.optim import Tensors

if TYPE_CHECKING:
    from testtime.adaptation.learner import Learner


def adapt_each(learner: "Learner", call: Call, chunk: int) -> Tensor:
    """Adapt to every sample alone, ``chunk`` at once, each from the start; keep nothing."""
    answers = []
    outputs: list[Output | None] = []
    skipped = learner.state.skipped.clone()
    notes: list[dict[str, list[Tensor]]] = []
    for first in range(0, call.x.shape[0], max(chunk, 1)):
        rows = call.rows(slice(first, first + max(chunk, 1)))
        with learner.opened(rows, many=rows.x.shape[0] if chunk else 0, fresh=True):
            learner.notes = {}
            logits = learner.answered(learner.method.step(learner, rows.x))
            learner.require_finite(logits)
            skipped += (~learner.finite).sum()
            answers.append(logits)
            outputs.append(learner.output)
            notes.append(
                {
                    k: held if chunk else [t.unsqueeze(0) for t in held]
                    for k, held in learner.notes.items()
                }
            )
    learner.state.skipped.copy_(skipped)
    learner.state.batch += 1
    learner.output = join(outputs)
    learner.notes = {
        k: [torch.cat(parts) for parts in zip(*(part[k] for part in notes), strict=True)]
        for k in notes[0]
    }
    return torch.cat(answers)


def evaluate_each(
    learner: "Learner", f: Callable[[Net, Tensor, Tensors], Found], weights: Tensors
) -> Found:
    """Return what ``f(net, x, memory)`` returns for every sample, stacked.

    Args:
        learner: in the middle of a call of n samples.
        f: sees one sample, as a batch of one.
        weights: ``[n, ...]``; the memory is stacked too, everything else is shared.
    """
    work, call = learner.work, learner.call
    assert call is not None
    kinds: list[type[Found]] = []
    outputs: list[tuple[Any, int]] = []

    def one(weights: Tensors, memory: Tensors, rows: dict[Any, Tensor]) -> dict[str, Any]:
        alone = call.put({k: row.unsqueeze(0) for k, row in rows.items()})
        learner.call, learner.outputs = alone, []
        found = named(f(Net(learner, weights, work.buffers), alone.x, memory), learner.method)
        kinds.append(type(found))
        leaves: list[Tensor] = []
        if isinstance(found, Objective) and found.logits is not None and learner.outputs:
            output = chosen(learner.outputs, found.logits)
            if output is None or output[1] is not found.logits:
                raise RuntimeError("the rest of the output belongs to another forward")
            tree(leaves.append, output[0])
            places = [k for k, leaf in enumerate(leaves) if leaf is output[1]]
            # Logits that a function computed are not in the output, and are the whole answer.
            leaves = leaves if places else []
            outputs.extend((output[0], place) for place in places)
        parts = {**vars(found), "leaves": dict(enumerate(leaves))}
        return {k: v for k, v in parts.items() if v is not None}

    try:
        # The fused attention of the CPU has no batching rule: vmap would loop over it and warn.
        with sdpa_kernel(SDPBackend.MATH):
            parts = vmap(one, randomness="same")(weights, work.memory, call.batched())
    finally:
        learner.call, learner.outputs = call, []
    leaves = [t.flatten(0, 1) if t.dim() > 1 else t for t in parts.pop("leaves").values()]
    if outputs:
        stream = iter(leaves)
        learner.output = (tree(lambda _: next(stream), outputs[0][0]), leaves[outputs[0][1]])
    return kinds[0](**parts)


def join(outputs: list[Output | None]) -> Output | None:
    """Return the outputs of parts of a batch as that of the whole; none where they were tensors."""
    found = [output for output in outputs if output is not None]
    if len(found) < len(outputs):
        return None
    logits: list[Tensor] = []

    def whole(*parts: Tensor) -> Tensor:
        joined = torch.cat(parts) if parts[0].dim() else torch.stack(parts)
        if parts[0] is found[0][1]:
            logits.append(joined)
        return joined

    raw = tree(whole, *(raw for raw, _ in found))
    return (raw, logits[0]) if logits else None
