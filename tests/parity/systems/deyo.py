"""DeYO."""

import math

import torch
from torch import Tensor

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.optimizers import momenta
from tests.parity.recording import Config, Recording, Unreplayable
from tests.parity.replay import Adapter
from testtime.adaptation.adapted import Adapted


class DeYO(Adapter):
    """Extras: masks and counts, what the destroyed images gave, the momentum."""

    def method(self, config: Config) -> tt.DeYO:
        """Return DeYO as the authors' code has it, with the recorded hyper-parameters."""
        margin, weight_margin = config.get("margin_factor"), config.get("margin_e0_factor")
        log_classes = config.get("deyo_margin") / margin
        if abs(config.get("margin_e0") - weight_margin * log_classes) > 1e-9:
            raise Unreplayable("its two margins are of different numbers of classes")
        if not config.get("filter_ent"):
            margin = math.log(1000) / log_classes
        parts = {"entropy": config.get("reweight_ent"), "plpd": config.get("reweight_plpd")}
        row, column = config.get("row_start"), config.get("column_start")
        threshold = config.get("plpd_threshold")
        return tt.DeYO.preset(
            "official",
            optimizer=tt.SGD(config.get("lr"), config.get("momentum")),
            margin=margin,
            weight_margin=weight_margin,
            plpd=threshold if config.get("filter_plpd") else None,
            weights=tuple(part for part, counts in parts.items() if counts),
            destroy=config.get("aug_type"),
            patches=config.get("patch_len"),
            window=(config.get("occlusion_size"), row, column),
            steps=config.get("steps", 1),
        )

    def drawn(self, name: str, inner: int, steps: int) -> str:
        """Return the recorded name: a permutation, of whatever."""
        return "perm" if steps == 1 else f"perm.{inner}"

    def started(self, adapted: Adapted, recording: Recording, comparison: Comparison) -> None:
        """Spread the permutations of the sure images over the batch; compare what they give."""
        method = adapted.method
        assert isinstance(method, tt.DeYO)
        for step in recording.steps():
            x, sure = recording[f"in/{step}/x"], recording[f"extra/{step}/mask1"]
            drawn = {"patch": method.patches**2, "pixel": x.shape[-2] * x.shape[-1]}
            path = f"draw/{step}/perm"
            whole = torch.arange(drawn.get(method.destroy, 0)).unsqueeze(0)
            if method.destroy == "patch":
                whole = whole.repeat(len(x), 1)
                if sure.any():
                    whole[sure] = recording[path]
            elif sure.any() and method.destroy == "pixel":
                whole = recording[path].unsqueeze(0)
            if method.destroy != "occ":
                recording.put(path, whole)
            if sure.any():
                destroyed = method.destroyed(x, lambda name, make, drawn=whole: drawn)
                comparison.check(f"extra/{step}/x_prime", destroyed[sure])

    def outputs(self, adapted: Adapted, x: Tensor) -> dict[str, Tensor]:
        """Return the loss, which the authors have where something was kept."""
        return {"loss": adapted.notes["loss"][-1]}

    def extras(self, adapted: Adapted) -> dict[str, Tensor]:
        """Return the notes of what was sure, and the momentum."""
        sure, kept, plpd, logits = (
            adapted.notes[name][-1] for name in ("sure", "kept", "plpd", "destroyed_logits")
        )
        return {
            "mask1": sure,
            "mask2": kept,
            "counts": torch.stack([sure.sum(), kept.sum()]),
            "plpd": plpd[sure],
            "logits_prime": logits[sure],
            **momenta(adapted.learner.state),
        }

    def facts(self, adapted: Adapted, config: Config) -> dict[str, bool]:
        """Return whether the right parameters adapt."""
        return {"config.params": config.get("params") == list(adapted.learner.state.weights)}


KINDS = {"adapt": DeYO().replay}
