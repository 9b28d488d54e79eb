"""Two small networks whose decoders have learned, one for each kind of pixels."""

import pytest
import torch
import torch.nn.functional as F

from testtime.models.mae import MAE, Sizes, masking, patchify, targets


@torch.no_grad()
def fitted(normalised: bool) -> MAE:
    """Return a random network whose last layer is the best one for ramps."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        mae = MAE(16, 4, Sizes(64, 1, 4), Sizes(128, 1, 4), normalised=normalised).double()
        corners = torch.randn(400, 3, 2, 2)
        images = F.interpolate(corners, size=(16, 16), mode="bilinear", align_corners=True).double()
        hidden = masking(torch.rand(400, 16).argsort(1), 4)
    # What comes before the last layer is what it predicts when it is the identity.
    layer, mae.decoder_pred = mae.decoder_pred, torch.nn.Linear(128, 128).double()
    mae.decoder_pred.weight.copy_(torch.eye(128))
    torch.nn.init.zeros_(mae.decoder_pred.bias)
    inputs = mae.decode(mae.encode(mae.embed(images), hidden.keep), hidden.restore)[hidden.mask]
    wanted = targets(patchify(images, 4), normalised)[hidden.mask]
    ones = torch.ones(len(inputs), 1, dtype=inputs.dtype)
    best = torch.linalg.lstsq(torch.cat([inputs, ones], 1), wanted).solution
    layer.weight.copy_(best[:-1].T)
    layer.bias.copy_(best[-1])
    mae.decoder_pred = layer
    return mae.float().eval()


@pytest.fixture(scope="package")
def plain() -> MAE:
    """Return the one that predicts plain pixels."""
    return fitted(normalised=False)


@pytest.fixture(scope="package")
def normalised() -> MAE:
    """Return the one that predicts pixels normalised patch by patch."""
    return fitted(normalised=True)
