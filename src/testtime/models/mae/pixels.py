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
def has_learned(mae: MAE, normalised: bool) -> bool:
    """Return whether the decoder predicts ramps between random colours better than zero would.

    An untrained one does far worse; those trained on normalised pixels do better under their own
    target, on images unlike any that they have seen.
    """
    generator = torch.Generator().manual_seed(0)
    corners = torch.randn(_IMAGES, mae.channels, 2, 2, generator=generator)
    images = F.interpolate(corners, size=mae.image, mode="bilinear", align_corners=True)
    prediction, patches, hidden = _predicted(mae, images, generator)
    target = targets(patches, normalised)
    loss, of_zero = (masked_loss(p, target, hidden) for p in (prediction, 0 * prediction))
    return bool(loss < 0.95 * of_zero)


def require_target(mae: MAE, declared: bool | None) -> bool:
    """Return whether the decoder predicts normalised pixels: as declared, else as it shows.

    A declaration that its predictions contradict is refused. An untrained decoder contradicts none.

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
    if (declared and plain) or (not declared and normalised and has_learned(mae, True)):
        said, found = ("normalised", "plain") if declared else ("plain", "normalised")
        raise ValueError(
            f"The decoder is declared to predict {said} pixels, but it predicts {found} ones: "
            f"{shown}. Pass normalised={not declared}, or give the file that you mean: those named "
            "'_full' predict normalised pixels, the visualisation files plain ones."
        )
    return declared


def _predicted(mae: MAE, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return the prediction of random masked images, their patches, and which were hidden."""
    weight = mae.patch_embed.proj.weight
    order = torch.rand(len(images), mae.patches, generator=generator).argsort(1).to(weight.device)
    hidden = masking(order, max(1, keep_count(mae.patches, _RATIO)))
    images = images.to(weight)
    prediction = mae.decode(mae.encode(mae.embed(images), hidden.keep), hidden.restore)
    return prediction, patchify(images, mae.patch), hidden.mask
