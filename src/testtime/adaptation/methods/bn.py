"""BN adaptation: the statistics of the test data in the place of the source's.

Papers: Schneider, Rusak et al., NeurIPS 2020, arXiv 2006.16971 (mixed with the source's);
Nado et al., 2020, arXiv 2006.10963 (the batch's alone).
Code that was recorded: bethgelab/robustness; ``Norm`` of DequanWang/tent.
"""

from dataclasses import dataclass, fields
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from testtime.adaptation import select
from testtime.adaptation.batchnorm import batch_norms, normalise_with, use_batch_statistics
from testtime.adaptation.core import Draw, Method, Net, Objective, nothing_found
from testtime.adaptation.optim import Tensors


@dataclass(frozen=True)
class BNAdapt(Method):
    """Normalise with statistics of the test data; no gradient, no loss.

    With ``m, v`` a layer's mean and variance over the batch and ``m_s, v_s`` the source's, variant
    ``"batch"`` normalises with ``m`` and the biased ``v``; ``"mix"`` with ``p * m_s + (1 - p) * m``
    and likewise the unbiased ``v``, where ``p`` is ``prior`` or ``N / (N + B)`` for
    ``source_size=N`` (2006.16971, equation 3); ``"cumulative"`` with averages over all batches
    so far; ``"moving"`` with exponential averages that start at the source's (two forwards).
    State: the running statistics in the last two variants, none in the others.

    Fails with small batches (less so with a prior), streams ordered by class, mixed shifts.

    Changed from the official code: every kind of BatchNorm adapts, not BatchNorm2d alone, and
    ``"batch"`` keeps no running statistics, for it never reads them. Preset ``official`` is the
    code: BatchNorm2d, and running statistics that move unused.

    Args:
        variant: see above.
        prior: weight of the source's statistics under ``"mix"``, from 0 to 1.
        source_size: the source counts as so many images under ``"mix"``; in place of ``prior``.
        parts: the moments that adapt under ``"mix"``; the other stays the source's.
        momentum: of the moving averages; none: the layers' own.
        eps: in place of the layers' own.
        running: under ``"batch"``: ``"none"``, or statistics that move from the source's
            (``"source"``) or from zero mean and unit variance (``"fresh"``).
        layers: the kinds of layers.
    """

    variant: Literal["batch", "mix", "cumulative", "moving"] = "batch"
    prior: float = 0.0
    source_size: int | None = None
    parts: tuple[str, ...] = ("mean", "var")
    momentum: float | None = None
    eps: float | None = None
    running: Literal["none", "source", "fresh"] = "none"
    layers: tuple[type[nn.Module], ...] = select.BATCH_NORMS

    name = "bn"
    adapts = "the statistics of BatchNorm layers"
    needs = "BatchNorm layers"
    tested = "corruptions one at a time, batches of 1 to 512"
    cost = (1, 0)
    presets = {"official": {"layers": (nn.BatchNorm2d,), "running": "source"}}  # noqa: RUF012

    def __post_init__(self) -> None:
        """Refuse unknown words, and options that the variant would not read."""
        super().__post_init__()
        known = {
            "variant": ("batch", "mix", "cumulative", "moving"),
            "running": ("none", "source", "fresh"),
        }
        for option, words in known.items():
            if getattr(self, option) not in words:
                raise ValueError(
                    f"BNAdapt({option}={getattr(self, option)!r}) is not known: use one of {words}."
                )
        if unknown := set(self.parts) - {"mean", "var"}:
            raise ValueError(f"BNAdapt(parts=...) names {sorted(unknown)}: use 'mean' and 'var'.")
        for option in ("prior", "momentum"):
            if not 0 <= (getattr(self, option) or 0) <= 1:
                raise ValueError(
                    f"BNAdapt({option}={getattr(self, option)}): it is a weight between 0 and 1."
                )
        if self.source_size is not None and (self.source_size < 1 or self.prior):
            raise ValueError(
                f"BNAdapt(source_size={self.source_size}, prior={self.prior}): it is a count of "
                "images, at least 1, and stands in the place of prior."
            )
        if self.optimizer or self.steps != 1:
            raise ValueError("BNAdapt has no loss to descend: leave optimizer and steps out.")
        reads = {"prior": "mix", "source_size": "mix", "parts": "mix", "running": "batch"}
        for field in fields(self):
            wanted = reads.get(field.name, self.variant)
            if wanted != self.variant and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"BNAdapt({field.name}=...) is read under variant='{wanted}' alone, but the "
                    f"variant is '{self.variant}'. Leave it out, or change the variant."
                )

    @property
    def answers(self) -> Literal["before", "after"]:
        """After: the averages have taken the batch in; the other variants keep nothing of it."""
        return "after" if self.variant in ("cumulative", "moving") else "before"

    def configure(self, module: nn.Module) -> nn.Module:
        """Set the layers' constants, and hook in the statistics that they normalise with."""
        layers = batch_norms(module, self.layers)
        if not layers:
            raise nothing_found(self, module)
        for layer in layers.values():
            layer.eps = layer.eps if self.eps is None else self.eps
            layer.momentum = layer.momentum if self.momentum is None else self.momentum
            if self.running == "fresh" or self.variant == "cumulative":
                layer.reset_running_stats()
            if self.variant == "mix":
                normalise_with(layer, self._mixed, keep=False)
            if self.variant == "cumulative":
                normalise_with(layer, _averaged, keep=True)
        if self.variant == "batch" and self.running == "none":
            use_batch_statistics(module, self.layers)
        return module

    def select(self, module: nn.Module) -> list[str]:
        """Return the running statistics that move; none where those of the batch serve alone."""
        still = self.variant == "mix" or (self.variant == "batch" and self.running == "none")
        return [] if still else select.norm_statistics(module, self.layers)

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return the logits; moving averages move first, in a forward whose answer is dropped."""
        if self.variant == "moving":
            net.train(batch_norms(net.module, self.layers))(x)
        return Objective(logits=self.predict(net, x, memory))

    def answering(self, net: Net, memory: Tensors) -> Net:
        """Return the network under the variant's statistics."""
        batch = self.variant == "batch"
        return net.train(batch_norms(net.module, self.layers)) if batch else net

    def _mixed(
        self, layer: _BatchNorm, mean: Tensor, var: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        size = self.source_size
        prior = self.prior if size is None else size / (size + rows)
        source_mean, source_var = layer.running_mean, layer.running_var
        assert source_mean is not None
        assert source_var is not None
        return (
            prior * source_mean + (1 - prior) * mean if "mean" in self.parts else source_mean,
            prior * source_var + (1 - prior) * var if "var" in self.parts else source_var,
        )


def _averaged(layer: _BatchNorm, mean: Tensor, var: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    assert layer.num_batches_tracked is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.num_batches_tracked = layer.num_batches_tracked + 1
    count = layer.num_batches_tracked
    return (
        layer.running_mean + (mean - layer.running_mean) / count,
        layer.running_var + (var - layer.running_var) / count,
    )
