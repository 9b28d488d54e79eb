"""Plain or normalised pixels: which of the two does a trained decoder predict?

Names and shapes do not tell, and the wrong target is the commonest mistake with these checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.models.mae.masking import keep_count, masked_loss, masking, patchify, targets
from testtime.models.mae.network import MAE

# Shares of the patch means in a prediction: two small networks trained on CIFAR-10 had 0.01 and
# 0.9, an untrained one 0.2.
PLAIN_ABOVE, NORMALISED_BELOW = 0.3, 0.2

_IMAGES, _RATIO = 8, 0.75


@torch.no_grad()
def mean_share(mae: MAE) -> float:
    """Return the rms of predicted patch means as a share of the rms of the prediction.

    Over the hidden patches of random noise. Pixels that are normalised patch by patch have mean
    zero, so a decoder that was trained on them gives about 0, one trained on plain pixels does not;
    an untrained one of n values a patch gives about ``1 / sqrt(n)``.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_IMAGES, mae.channels, *mae.image, generator=generator)
    prediction, _, hidden = _predicted(mae, noise, generator)
    unseen = prediction[hidden]
    return float(unseen.mean(1).square().mean().sqrt() / unseen.square().mean().sqrt())


@torch.no_grad()
def has_learned(mae: MAE) -> bool:
    """Return whether the decoder foretells normalised pixels of simple images better than zero.

    Either ramps between random colours, or soft bright spots on black: what natural images and what
    digits teach. A decoder that was trained on normalised pixels is better by a quarter on one of
    them (two small networks, of CIFAR-10 and of digits); an untrained one is far worse than zero.
    """
    generator = torch.Generator().manual_seed(0)
    for images in (_ramps(mae, generator), _spots(mae, generator)):
        prediction, patches, hidden = _predicted(mae, images, generator)
        target = targets(patches, normalised=True)
        loss, of_zero = (masked_loss(p, target, hidden) for p in (prediction, 0 * prediction))
        if bool(loss < 0.9 * of_zero):
            return True
    return False


def require_target(mae: MAE, declared: bool | None) -> bool:
    """Return whether the decoder predicts normalised pixels: as declared, else as it shows.

    A declaration that its predictions contradict is refused. An untrained decoder contradicts none,
    but of few values a patch (48 and less) it may look plain, for its means vary.

    Raises:
        ValueError: the declared target is the wrong one, or nothing is declared and the predictions
            do not tell.
    """
    share = mean_share(mae)
    plain, normalised = share > PLAIN_ABOVE, share < NORMALISED_BELOW
    shown = (
        f"the means of predicted patches have {share:.2f} of the prediction's size (above "
        f"{PLAIN_ABOVE}: plain pixels, below {NORMALISED_BELOW}: normalised)"
    )
    if declared is None:
        if not plain and not normalised:
            raise ValueError(
                "Was this decoder trained on plain pixels or on pixels normalised patch by patch? "
                f"Its file does not say, and its predictions do not tell: {shown}. Pass "
                "normalised=True for the '_full' files of MAE, False for the visualisation files."
            )
        return normalised
    if (declared and plain) or (not declared and normalised and has_learned(mae)):
        said, found = ("normalised", "plain") if declared else ("plain", "normalised")
        raise ValueError(
            f"The decoder is declared to predict {said} pixels, but it predicts {found} ones: "
            f"{shown}. Pass normalised={not declared}, or give the file that you mean: those named "
            "'_full' predict normalised pixels, the visualisation files plain ones."
        )
    return declared


def _ramps(mae: MAE, generator: torch.Generator) -> Tensor:
    corners = torch.randn(_IMAGES, mae.channels, 2, 2, generator=generator)
    return F.interpolate(corners, size=mae.image, mode="bilinear", align_corners=True)


def _spots(mae: MAE, generator: torch.Generator) -> Tensor:
    height, width = mae.image
    rows, columns = torch.linspace(0, 1, height).view(-1, 1), torch.linspace(0, 1, width)
    numbers = torch.rand(3, _IMAGES, 1, 1, generator=generator)
    (down, right), size = 0.25 + 0.5 * numbers[:2], 0.1 + 0.15 * numbers[2]
    squares = ((rows - down) ** 2 + (columns - right) ** 2) / size**2
    return torch.exp(-squares / 2).unsqueeze(1).expand(-1, mae.channels, -1, -1)


def _predicted(mae: MAE, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return the prediction of random masked images, their patches, and which were hidden."""
    weight = mae.patch_embed.proj.weight
    order = torch.rand(len(images), mae.patches, generator=generator).argsort(1).to(weight.device)
    hidden = masking(order, max(1, keep_count(mae.patches, _RATIO)))
    images = images.to(weight)
    prediction = mae.decode(mae.encode(mae.embed(images), hidden.keep), hidden.restore)
    return prediction, patchify(images, mae.patch), hidden.mask
