"""What was learned, as a plain module: no engine, no state, ready for other tools."""

import copy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from testtime.adaptation import coupling
from testtime.adaptation.batchnorm import moments
from testtime.adaptation.calls import Call
from testtime.adaptation.core import Method
from testtime.adaptation.learner import Learner

Frozen = Literal["source", "last"]


class Exported(NamedTuple):
    """A plain module in eval mode, and how far its answer is from the adapted model's.

    Args:
        module: the user's network with the adapted weights and statistics; shares nothing.
        gap: largest difference of a logit from ``predict()`` on the batch that was given; none
            where none was given.
    """

    module: nn.Module
    gap: float | None


def export(learner: Learner, call: Call | None, statistics: Frozen | None) -> Exported:
    """Return the adapted network as a plain module. Law 12.

    Args:
        learner: what adapted.
        call: a batch, typically the last one seen; needed where answers depend on the batch.
        statistics: for such methods, what BatchNorm layers normalise with from now on: those of the
            ``"source"``, or of this ``"last"`` batch.

    Raises:
        ValueError: the answers depend on the batch and it was not said what to freeze, or what
            the method does is more than the network's own forward.
    """
    method = type(learner.method).__name__
    if call is not None:
        coupling.measure(learner, call)
    elif learner.couples is None or type(learner.method).predict is not Method.predict:
        raise ValueError(
            f"Without a batch it is not known whether a plain module answers as {method} does. "
            "Pass one, typically the last: export(batch)."
        )
    if learner.couples and (call is None or statistics is None):
        raise ValueError(
            f"The answers of {method} depend on the batch they come in, which a plain module "
            "cannot do. Say what to freeze: export(batch, statistics='source') or 'last'."
        )
    module = copy.deepcopy(learner.original)
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    answering = learner.method.answering(learner.live, learner.state.memory)
    if lost := set(answering.weights) - set(held):
        raise ValueError(
            f"{method} adapts '{min(lost)}', which your own network does not have, so a plain "
            "module of it cannot hold what was learned. Keep the adapted model."
        )
    with torch.no_grad():
        for name, value in {**answering.weights, **answering.buffers}.items():
            if name in held:
                held[name].copy_(value)
        if learner.couples and statistics == "last" and call is not None:
            for name, (mean, var) in _last_statistics(learner, call).items():
                layer = module.get_submodule(name)
                assert isinstance(layer, _BatchNorm)
                layer.running_mean, layer.running_var = mean.clone(), var.clone()
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            layer.eps = learner.module.get_submodule(name).eps  # type: ignore[assignment]
    if call is None:
        return Exported(module.eval(), None)
    gap, largest = _gap(learner, module.eval(), call)
    if not learner.couples and gap > 1e-4 * largest:
        raise ValueError(
            f"{method} answers otherwise than its network's forward (by {gap:.2g}), so a plain "
            "module cannot hold it. Keep the adapted model."
        )
    return Exported(module, gap)


def _last_statistics(learner: Learner, call: Call) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and variance that each BatchNorm layer normalises this batch with."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            assert isinstance(layer, _BatchNorm)
            if layer.training or layer.running_mean is None or layer.running_var is None:
                mean, var, count = moments(args[0])
                found[name] = (mean, var * (count - 1) / max(count, 1))
            else:
                found[name] = (layer.running_mean, layer.running_var)

        return hook

    # Before the method's own hooks put the source's statistics back.
    hooks = [
        layer.register_forward_hook(keep(name), prepend=True)
        for name, layer in learner.module.named_modules()
        if isinstance(layer, _BatchNorm)
    ]
    try:
        learner.predict(call)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _gap(learner: Learner, module: nn.Module, call: Call) -> tuple[float, float]:
    plain = learner.logits_of(learner.plain_output(module, call))
    answer = learner.predict(call)
    return float((plain - answer).abs().max()), float(answer.abs().max())
