"""MEMO, and its mixtures of augmentations."""

from typing import Any

import torch
from torch import Tensor

import testtime as tt
from tests.parity.errors import Comparison
from tests.parity.networks import build
from tests.parity.optimizers import optimizer, slots
from tests.parity.recording import Config, Recording, Unreplayable
from tests.parity.replay import Adapter
from testtime.adaptation import views
from testtime.adaptation.adapted import Adapted
from testtime.adaptation.preprocessing import HALF, IMAGENET, Preprocessing
from testtime.adaptation.views import pillow
from testtime.adaptation.views.augmix import OPERATIONS


class MEMO(Adapter):
    """Extras: logits before adapting, the optimiser's state."""

    def method(self, config: Config) -> tt.MEMO:
        """Return MEMO as the authors' code has it, with the recorded hyper-parameters."""
        prior = config.get("prior_strength")
        prior = None if prior is None or prior < 0 else prior
        share = 1.0 if prior is None else prior / (prior + 1)
        if abs((config.get("bn_prior", None) or share) - share) > 1e-12:
            raise Unreplayable(f"its bn_prior is not N / (N + 1) with N={prior}")
        return tt.MEMO.preset(
            "official",
            optimizer=optimizer(config),
            views=config.get("views"),
            steps=config.get("niter"),
            prior=prior,
        )

    def options(self, recording: Recording) -> dict[str, Any]:
        """Return the normalisation that made the inputs of the pictures beside them."""
        for mean, std in (HALF, IMAGENET):
            if all(_made(recording, step, Preprocessing(mean, std)) for step in recording.steps()):
                return {"mean": mean, "std": std}
        raise Unreplayable("its inputs are not its pictures by a normalisation that is known")

    def taken(self, name: str, value: Tensor) -> Tensor:
        """Return views of one image, ``[V, 1, 3, H, W]``."""
        return value.unsqueeze(1)

    def outputs(self, adapted: Adapted, x: Tensor) -> dict[str, Tensor | None]:
        """Return losses and logits of the views, a row for each inner step."""
        notes = adapted.notes
        return {
            "loss": torch.stack(notes["loss"]),
            "view_logits": torch.stack(notes["view_logits"]).squeeze(2),
        }

    def extras(self, adapted: Adapted) -> dict[str, Tensor | None]:
        """Return the optimiser's state."""
        return dict(slots(adapted.learner.state, "opt/{}/{}"))

    def replay(self, recording: Recording) -> Comparison:
        """Replay a recording, whose views of all inner steps are one tensor."""
        for step in recording.steps():
            for inner, seen in enumerate(recording[f"draw/{step}/views"]):
                steps = recording.config.get("niter")
                name = "views" if steps == 1 else f"views.{inner}"
                recording.put(f"draw/{step}/{name}", seen)
        comparison = super().replay(recording)
        options = self.options(recording)
        source = tt.adapt(build(recording), self.method(recording.config), **options)
        for step in recording.steps():
            if (path := f"extra/{step}/source_logits") in recording:
                comparison.check(path, source.predict(recording[f"in/{step}/x"]))
        return comparison


def _made(recording: Recording, step: int, normalisation: Preprocessing) -> bool:
    x, picture = recording[f"in/{step}/x"], recording[f"in/{step}/image"]
    images = picture.permute(2, 0, 1).unsqueeze(0).to(x.dtype) / 255
    return x.shape == images.shape and torch.allclose(normalisation.apply(images), x)


def replay_mixtures(recording: Recording) -> Comparison:
    """Replay the mixtures of one picture, a view for each recorded set of random numbers."""
    drawn, comparison = mixtures(recording.config), Comparison(recording)
    picture = recording["in/image"].permute(2, 0, 1).unsqueeze(0)
    if picture.shape[-1] != recording.config.get("size"):
        raise Unreplayable("the picture is not of the size that its config names")
    plain, ends = pillow.chains(picture.to(torch.get_default_dtype()) / 255, drawn)
    seen = views.mixed((plain - 0.5) / 0.5, (ends - 0.5) / 0.5, drawn)
    comparison.check("out/views", seen.squeeze(1))
    return comparison


def mixtures(config: Config) -> views.Mixtures:
    """Return recorded random numbers as the library has them."""
    draws, padding = config.get("draws"), config.get("pad")

    # [V, 3, 3, 3]: of each operation its index, level and direction; what is not there is -1.
    numbers = torch.tensor(
        [[[*map(_numbers, c), *[[-1, 0, 0]] * (3 - len(c))] for c in d["chains"]] for d in draws]
    )
    corner = torch.tensor([padding, padding, 0, 0])
    return views.Mixtures(
        boxes=torch.tensor([one["crop"] for one in draws]) - corner,
        flips=torch.tensor([one["flip"] for one in draws]),
        operations=numbers[..., 0].long(),
        levels=numbers[..., 1],
        negative=numbers[..., 2] > 0.5,
        # Rounded to float32 by the authors.
        weights=torch.tensor([one["w"] for one in draws], dtype=torch.float32),
        shares=torch.tensor([one["m"] for one in draws], dtype=torch.float32),
    )


def _numbers(operation: list[Any]) -> list[float]:
    name, *numbers = operation
    return [OPERATIONS.index(name), *numbers, *[0.0] * (2 - len(numbers))]


KINDS = {"adapt": MEMO().replay, "operator": replay_mixtures}
