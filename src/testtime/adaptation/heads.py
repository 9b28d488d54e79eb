"""The classifier at the end of a model, a Linear layer, and the features that go into it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from testtime.adaptation.checks import some
from testtime.adaptation.core import ADVICE, Method, Net

Look = Callable[[tuple[Any, ...], Any], Any]  # (arguments, output) of a module's call


def find(method: Method, module: nn.Module, head: str | None = None) -> str:
    """Return the name of the classifier: the one given, timm's, or else the last Linear layer.

    Whether its output is the logits only a forward can tell: :func:`require_logits`.

    Args:
        method: who asks, for messages.
        module: any model.
        head: the dotted name of its classifier, where it is known.

    Raises:
        ValueError: there is no Linear layer, or none of that name, or it has a single output.
    """
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    asked = getattr(module, "get_classifier", lambda: None)()
    own = [name for name, layer in linear.items() if layer is asked]
    found = head or next(iter(own or reversed(linear)), "")
    if found not in linear:
        wanted = f"no Linear layer '{head}'" if head else "no Linear layer"
        raise ValueError(
            f"{type(method).__name__} needs the classifier of the model, but there is {wanted} in "
            f"this one (Linear layers: {some(list(linear)) or 'none'}).{ADVICE}"
        )
    if linear[found].out_features < 2:
        raise ValueError(
            f"{type(method).__name__} needs a classifier, but '{found}' has one output: a "
            f"regression, or a sigmoid's logit.{ADVICE}"
        )
    return found


def features(net: Net, x: Tensor, head: str) -> tuple[Tensor, Tensor]:
    """Return what goes into the classifier, ``[B, D]``, and the logits, ``[B, C]``; pure.

    Args:
        net: the network under any weights.
        x: a batch.
        head: the name of the classifier.

    Raises:
        ValueError: the classifier is not called on one vector an image.
    """
    inputs: list[Tensor] = []
    with watching({net.module.get_submodule(head): lambda args, _: inputs.append(args[0])}):
        logits = net(x)
    if len(inputs) != 1 or inputs[0].dim() != 2 or logits.dim() != 2:
        raise ValueError(
            f"The classifier '{head}' should be called once, on features [B, D], for logits "
            f"[B, C], but it was called on {[list(t.shape) for t in inputs]} and the logits are "
            f"{list(logits.shape)}. Name another with head=.{ADVICE}"
        )
    return inputs[0], logits


def require_logits(net: Net, x: Tensor, head: str) -> None:
    """Run a batch to see that what the classifier puts out is the logits themselves.

    Raises:
        ValueError: it is not; the message names the layer whose output they are, if there is one.
    """
    outputs: dict[str, Tensor] = {}
    layers = {n: m for n, m in net.module.named_modules() if isinstance(m, nn.Linear)}

    def keep(name: str) -> Look:
        return lambda _, output: outputs.update({name: output} if output.dim() == 2 else {})

    with watching({layer: keep(name) for name, layer in layers.items()}):
        logits = net(x)
    if outputs.get(head) is logits:
        return
    right = next((name for name, output in outputs.items() if output is logits), None)
    then = f"no Linear layer's are.{ADVICE}"
    if right:
        then = f"those of '{right}' are. Pass head='{right}'."
    raise ValueError(f"The outputs of the classifier '{head}' are not the logits: {then}")


@contextmanager
def watching(watched: dict[nn.Module, Look]) -> Iterator[None]:
    """Call a function with the arguments and the output of each call of these modules, within."""

    def hook(look: Look) -> Callable[..., None]:
        return lambda _, args, output: look(args, output)

    hooks = [m.register_forward_hook(hook(look)) for m, look in watched.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
