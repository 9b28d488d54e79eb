"""The networks: shapes, what trains, one image for many masks, and bad input."""

import dataclasses

import pytest
import torch

from testtime.models.mae import DECODER, ENCODERS, HEADS, MAE, MAEClassifier, Sizes

SMALL = Sizes(16, 2, 4)
TINY = Sizes(8, 1, 2)


def orders(rows: int, patches: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, patches, generator=generator).argsort(1)


@pytest.mark.parametrize("images", [1, 3])
def test_many_masks_an_image_are_as_many_copies_of_it(images: int) -> None:
    mae = MAE(16, 4, SMALL, TINY, normalised=True).double()
    x, order = torch.rand(images, 3, 16, 16).double(), orders(4 * images, 16)
    once = mae.reconstruct(x, order)
    copies = mae.reconstruct(x.repeat_interleave(4, 0), order)
    torch.testing.assert_close(once.prediction, copies.prediction, rtol=1e-12, atol=1e-14)
    weights = [p for p in mae.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(r.loss, weights) for r in (once, copies)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match="Give as many rows to every image"):
        mae.reconstruct(x, order[:-1] if images > 1 else order[:, :3])


def test_visible_patches_alone_reach_the_encoder() -> None:
    mae, x = MAE(16, 4, SMALL, TINY, normalised=False), torch.rand(1, 3, 16, 16)
    order = torch.arange(16).view(1, 16)
    changed = x.clone()
    changed[..., 4:, :] += 1  # the patches of rows 1 to 3, which ratio 0.75 hides
    latents = [mae.reconstruct(image, order).latent for image in (x, changed)]
    assert torch.equal(*latents)


def test_the_order_of_visible_patches_does_not_matter_to_the_decoder() -> None:
    mae, x = MAE(16, 4, SMALL, TINY, normalised=True).double(), torch.rand(2, 3, 16, 16).double()
    order = orders(2, 16)
    other = torch.cat([order[:, :4].flip(1), order[:, 4:].flip(1)], 1)
    predictions = [mae.reconstruct(x, o).prediction for o in (order, other)]
    torch.testing.assert_close(*predictions, rtol=1e-10, atol=1e-12)


def test_rectangles_and_other_channels() -> None:
    mae = MAE((8, 12), 4, SMALL, TINY, head=TINY, classes=3, channels=1, normalised=True)
    x = torch.rand(2, 1, 8, 12)
    made = mae.reconstruct(x, orders(2, 6), ratio=0.5)
    assert made.prediction.shape == made.target.shape == (2, 6, 16)
    assert made.latent.shape == (2, 4, 16)
    assert mae(x).shape == (2, 3)


def test_position_tables_train_in_the_fine_tuned_classifier_alone() -> None:
    mae = MAE(16, 4, SMALL, TINY, head=TINY)
    fixed = {name for name, p in mae.named_parameters() if not p.requires_grad}
    assert fixed == {"pos_embed", "decoder_pos_embed", "classifier_pos_embed"}
    assert all(p.requires_grad for p in MAEClassifier(16, 4, SMALL).parameters())


def test_published_sizes() -> None:
    with torch.device("meta"):
        large = MAE(224, 16, ENCODERS["large"], DECODER, HEADS["base"])
    assert large.patches == 196
    assert sum(p.numel() for p in large.blocks.parameters()) == 24 * (12 * 1024**2 + 13 * 1024)
    assert large.classifier_pred.in_features == 768


def test_the_linear_head_takes_masked_tokens_and_the_vit_head_refuses() -> None:
    x, order = torch.rand(2, 3, 16, 16), orders(2, 16)
    linear = MAE(16, 4, SMALL, TINY, head="linear", classes=3, normalised=True).eval()
    assert linear.classify(linear.reconstruct(x, order).latent).shape == (2, 3)
    probe = MAE(16, 4, SMALL, TINY, head=TINY, classes=3, normalised=True)
    with pytest.raises(ValueError, match="all 17 tokens of an image, but got 5"):
        probe.classify(probe.reconstruct(x, order).latent)


def test_the_linear_head_normalises_the_class_token_alone() -> None:
    mae, x = MAE(16, 4, SMALL, head="linear", classes=3).double(), torch.rand(6, 3, 16, 16).double()
    token = mae.features(x)[:, 0]
    mean, variance = token.mean(0), token.var(0, correction=0)
    expected = mae.head((token - mean) / (variance + 1e-6).sqrt())
    torch.testing.assert_close(mae.train()(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mae.bn.running_mean, 0.1 * mean)
    still = mae.bn.running_var.clone()
    stored = (token - mae.bn.running_mean) / (still + 1e-6).sqrt()
    torch.testing.assert_close(mae.eval()(x), mae.head(stored), rtol=1e-10, atol=1e-12)
    assert torch.equal(mae.bn.running_var, still)


@pytest.mark.parametrize("shape", [(2, 3, 16, 20), (2, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes images \[N, 3, 16, 16\], but the input is"):
        MAE(16, 4, SMALL).features(torch.rand(shape))


def test_what_a_network_lacks_is_said() -> None:
    x, order = torch.rand(1, 3, 16, 16), orders(1, 16)
    with pytest.raises(ValueError, match="no head"):
        MAE(16, 4, SMALL, TINY)(x)
    with pytest.raises(ValueError, match="no decoder"):
        MAE(16, 4, SMALL).reconstruct(x, order)
    with pytest.raises(ValueError, match="a decoder for rotation"):
        MAE(16, 4, SMALL, TINY, task="rotation").reconstruct(x, order)
    with pytest.raises(ValueError, match="plain pixels or pixels normalised"):
        MAE(16, 4, SMALL, TINY).reconstruct(x, order)
    with pytest.raises(ValueError, match="hides all"):
        MAE(16, 4, SMALL, TINY, normalised=True).reconstruct(x, order, ratio=1.0)


@pytest.mark.parametrize("change", [{"heads": 3}, {"depth": 0}, {"dim": -8, "heads": -2}])
def test_sizes_that_cannot_be(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="heads must divide"):
        dataclasses.replace(TINY, **change)
