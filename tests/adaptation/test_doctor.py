"""Which methods fit a model, and whether inputs fit it."""

import pytest
import timm
import torch
from torch import nn

import testtime as tt
from testtime.adaptation.preprocessing import CLIP, HALF, IMAGENET, Preprocessing, mismatch

NONE = ((0.0,) * 3, (1.0,) * 3)


def net(norm):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


def images():
    """Return eight images that hold black and white, as photographs do."""
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x[:, :, 0], x[:, :, 1] = 0, 1
    return x


def preprocessed(pair):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in pair)
    return (images() - mean) / std


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=7)


def by_name(diagnosis):
    return {finding.method: finding for finding in diagnosis.findings}


def test_a_batch_norm_net():
    found = by_name(tt.doctor(net(nn.BatchNorm2d(8)), images()))
    assert all(found[name].fits for name in ("source", "bn", "tent"))
    assert found["tent"].adapts == ("1.weight", "1.bias")
    assert found["tent"].share == pytest.approx(16 / (3 * 8 * 9 + 8 + 16 + 8 * 4 + 4))
    assert found["tent"].changed > 0
    assert "batches under 32" in found["tent"].unsafe
    assert not found["source"].unsafe


def test_a_net_whose_statistics_need_two_images_says_so():
    flat = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    found = by_name(tt.doctor(flat, torch.rand(9, 5)))
    assert found["bn"].unsafe.endswith("a batch of 1 is refused")


def test_a_group_norm_net():
    found = by_name(tt.doctor(net(nn.GroupNorm(2, 8)), images()))
    assert found["tent"].fits
    assert not found["tent"].unsafe
    assert not found["bn"].fits
    assert "it looked for the statistics of BatchNorm layers" in found["bn"].detail
    assert "1 GroupNorm" in found["bn"].detail


def test_without_norm_layers_no_norm_method_fits():
    fitting = tt.doctor(net(nn.Identity()), images()).fitting
    assert "source" in fitting
    assert not {"bn", "tent", "sar"} & set(fitting)


def test_a_step_that_changes_nothing_is_no_fit():
    class Deaf(nn.Module):
        """Answers from a copy of its weights that was made too early."""

        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(5)
            self.cached = (self.norm.weight * 2).detach()
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(x * self.cached)

    found = by_name(tt.doctor(Deaf(), torch.rand(4, 5)))
    assert not found["tent"].fits
    assert "influences this model's answer" in found["tent"].detail


def test_without_inputs_nothing_is_run_and_that_is_said():
    diagnosis = tt.doctor(net(nn.BatchNorm2d(8)))
    assert set(diagnosis.fitting) >= {"source", "bn", "tent"}
    assert "not run" in by_name(diagnosis)["tent"].detail


def test_the_model_is_left_alone():
    model = net(nn.BatchNorm2d(8)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tt.doctor(model, images())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_vit_fed_the_mean_and_std_of_imagenet_is_caught():
    diagnosis = tt.doctor(vit(), preprocessed(IMAGENET))
    assert "look like images with the ImageNet mean" in diagnosis.inputs
    assert diagnosis.inputs in str(diagnosis)
    assert not tt.doctor(vit(), preprocessed(HALF)).inputs


def test_adapting_says_it_once_and_strict_refuses():
    adapted = tt.adapt(vit(), tt.Tent())
    with pytest.warns(UserWarning, match="look like images with the ImageNet mean"):
        adapted(preprocessed(IMAGENET))
    adapted(preprocessed(IMAGENET))
    assert "ImageNet" in adapted.report().said[0]
    with pytest.raises(ValueError, match="look like images with the ImageNet mean"):
        tt.adapt(vit(), tt.Tent(), strict=True)(preprocessed(IMAGENET))


def test_a_preprocessing_that_is_meant_is_not_questioned():
    tt.adapt(vit(), tt.Tent(), mean=IMAGENET[0], std=IMAGENET[1])(preprocessed(IMAGENET))


@pytest.mark.parametrize(
    "wanted", [IMAGENET, HALF, CLIP, NONE], ids=["imagenet", "half", "clip", "none"]
)
@pytest.mark.parametrize(
    "fed", [IMAGENET, HALF, CLIP, NONE], ids=["imagenet", "half", "clip", "none"]
)
def test_every_pair_of_preprocessings(wanted, fed):
    said = mismatch(preprocessed(fed), Preprocessing(*wanted))
    # ImageNet's and CLIP's lie within a few hundredths of each other: no range tells them apart.
    close = {id(IMAGENET), id(CLIP)}
    if wanted is fed:
        assert not said
    elif {id(wanted), id(fed)} != close:
        assert said


def test_images_of_255_are_refused_and_can_be_declared():
    model = net(nn.BatchNorm2d(8))
    diagnosis = tt.doctor(model, images() * 255)
    assert "looks like 0 to 255" in diagnosis.inputs
    with pytest.raises(ValueError, match="looks like 0 to 255"):
        tt.adapt(model, tt.Tent())(images() * 255)
    tt.adapt(model, tt.Tent(), mean=0, std=1 / 255)(images() * 255)


def test_low_contrast_images_are_not_suspected():
    dull = 0.5 + 0.15 * (images() - 0.5)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    assert not mismatch((dull - mean) / std, Preprocessing(*IMAGENET))


@pytest.mark.parametrize(("mean", "std"), [(0.5, None), (None, 0.5), ((0.5, 0.5), (0.5,))])
def test_half_a_preprocessing_is_refused(mean, std):
    with pytest.raises(ValueError, match="mean"):
        tt.adapt(net(nn.BatchNorm2d(8)), tt.Tent(), mean=mean, std=std)
