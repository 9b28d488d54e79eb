"""BN adaptation: whose statistics the BatchNorm layers use."""

from torch import nn

import testtime as tt
from tests.parity.recording import Config, Unreplayable
from tests.parity.replay import Adapter


class BN(Adapter):
    """No extras: all that changes is running statistics."""

    def method(self, config: Config) -> tt.BNAdapt:
        """Return the variant with the recorded hyper-parameters."""
        variant = config.get("variant")
        if variant == "batch_wise":
            return tt.BNAdapt.preset("official")
        if variant == "norm":
            none, fresh = config.get("no_stats", False), config.get("reset_stats", False)
            return tt.BNAdapt.preset(
                "official",
                running="none" if none else "fresh" if fresh else "source",
                eps=config.get("eps", 1e-5),
                momentum=config.get("momentum", 0.1),
            )
        if variant == "prior":
            return _mixed(prior=_prior(config))
        if variant == "alpha":
            return _mixed(prior=1 - config.get("alpha"))
        if variant == "cumulative":
            return tt.BNAdapt("cumulative", layers=(nn.BatchNorm2d,))
        if variant == "moving_average":
            # That code puts the whole network in train mode, so every kind of BatchNorm moves.
            return tt.BNAdapt("moving", momentum=config.get("momentum"))
        if "adapt_mean" in config or "adapt_var" in config:
            # The variant's name says the same in words: mean_only, var_only, ...
            chosen = {"mean": config.get("adapt_mean"), "var": config.get("adapt_var")}
            return _mixed(parts=tuple(part for part, adapts in chosen.items() if adapts))
        raise Unreplayable(f"its variant {variant!r} is not known")

    def prepare(self, network: nn.Module, config: Config) -> nn.Module:
        """Reset the counters, which stay behind when statistics are first reset, then removed."""
        if config.get("reset_stats", False) and config.get("no_stats", False):
            for layer in network.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.reset_running_stats()
        return network


def _mixed(prior: float = 0.0, parts: tuple[str, ...] = ("mean", "var")) -> tt.BNAdapt:
    return tt.BNAdapt("mix", prior=prior, parts=parts, layers=(nn.BatchNorm2d,))


def _prior(config: Config) -> float:
    """Return the prior; ``N`` images of the source against ``n`` of a batch say the same."""
    size, rows = config.get("N", None), config.get("n", None)
    prior: float = config.get("prior") if size is None or rows is None else size / (size + rows)
    if abs(config.get("prior", prior) - prior) > 1e-12:
        raise Unreplayable(f"its prior is not N / (N + n) with N={size}, n={rows}")
    return prior


KINDS = {"adapt": BN().replay}
