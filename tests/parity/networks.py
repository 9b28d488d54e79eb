"""Build the network that a recording describes."""

import importlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tests import operators  # noqa: F401 - before anything imports timm
from tests.parity.recording import Recording, Unreplayable
from testtime.adaptation.twoheads import TwoHeads
from testtime.models.resnet import ResNetGN, rotation_head

Layers = list[tuple[str, list[Any], dict[str, Any]]]


def resnet_gn_ttt(
    depth: int, base: int, groups: int, classes: int, pool: int, shared: str
) -> TwoHeads:
    """Return test-time training's network; its pooling is global, as ``pool`` says for its images.

    Args:
        depth: as below, of :class:`ResNetGN`.
        base: channels of the first stage.
        groups: of its GroupNorm; 0: BatchNorm.
        classes: logits.
        pool: side of the last feature map.
        shared: the last layer of the shared part.
    """
    network, branch = ResNetGN(depth, classes, base, groups), BRANCHES[shared]
    return TwoHeads(network, rotation_head(network, branch), branch)


class ExtHeadClassifier(TwoHeads):
    """TTT++'s network, whose recorded names lack the ``net.`` before its own parts."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a recorded state."""
        own = {own_name(name): value for name, value in state_dict.items()}
        return super().load_state_dict(own, *args, **kwargs)


def own_name(recorded: str) -> str:
    """Return the name of a tensor in :class:`ExtHeadClassifier` by its recorded one."""
    return recorded if recorded.startswith("head.") else f"net.{recorded}"


def ext_head_classifier(ext: Layers, head: Layers, classifier: Layers) -> ExtHeadClassifier:
    """Return a network of an extractor and a linear classifier, and a head beside that."""
    (linear,) = _layers(classifier)
    parts = {"ext": nn.Sequential(*_layers(ext)), "classifier": nn.Sequential()}
    parts["classifier"].add_module("fc", linear)
    return ExtHeadClassifier(
        nn.Sequential(OrderedDict(parts)), nn.Sequential(*_layers(head)), "classifier"
    )


def _layers(layers: Layers) -> list[nn.Module]:
    return [getattr(nn, kind)(*args, **kwargs) for kind, args, kwargs in layers]


BRANCHES = {"layer2": "layer3", "layer3": "fc"}

# Published networks that are built here, by the name that recordings give them.
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "ext_head_classifier": ext_head_classifier,
    "resnet_gn_ttt": resnet_gn_ttt,
}


def build(recording: Recording) -> nn.Module:
    """Return the network of a recording with its recorded weights, in eval mode.

    Raises:
        Unreplayable: its description, or one of its parts, is not known.
    """
    try:
        network = _make(recording.network)
        names = recording.under("init")
        network.load_state_dict({name: recording[f"init/{name}"] for name in names})
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise Unreplayable(f"its network cannot be built ({error})") from error
    return network.eval()


def _make(description: dict[str, Any]) -> nn.Module:
    if "sequential" in description:
        return nn.Sequential(*_layers(description["sequential"]))
    if "timm" in description:
        return _make_timm(description["timm"], description.get("kwargs", {}))
    name = description.get("builder")
    if name not in BUILDERS:
        raise Unreplayable(f"its network is of a kind that is not known: {description}")
    return BUILDERS[name](**description.get("args", {}))


def _make_timm(name: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise Unreplayable(f"its network needs timm, which is not installed ({error})") from error
    network: nn.Module = timm.create_model(name, **kwargs)
    # Recorded inputs are random numbers, so what the model says about its images does not hold.
    vars(network).update(pretrained_cfg={}, default_cfg={})
    return network
