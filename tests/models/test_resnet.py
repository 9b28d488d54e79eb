import pytest
import torch
from torch import nn

from testtime.models import CifarResNet, Normalize, ResNetGN

NETWORKS = {"bn": CifarResNet, "gn": ResNetGN}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param](depth=8, num_classes=7, width=8).eval()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 20), (48, 28)])
def test_any_multiple_of_four_gives_logits(network, height, width):
    assert network(torch.rand(3, 3, height, width)).shape == (3, 7)


def test_the_sizes_of_the_papers():
    # Tensor and value counts of the checkpoints that the field shares.
    bn20, bn56, gn26 = CifarResNet(20), CifarResNet(56), ResNetGN(26)
    assert [len(m.state_dict()) for m in (bn20, bn56, gn26)] == [97 + 19, 277 + 55, 77]
    assert sum(p.numel() for p in bn20.parameters()) == 269_722
    assert sum(p.numel() for p in bn56.parameters()) == 853_018
    assert sum(p.numel() for p in gn26.parameters()) == 366_938


def test_names_of_the_checkpoints():
    bn, gn = CifarResNet(8).state_dict(), ResNetGN(8).state_dict()
    assert {"conv1.weight", "bn1.running_mean", "layer2.0.conv1.weight", "linear.bias"} <= set(bn)
    assert {"conv1.weight", "layer3.0.bn2.bias", "bn.weight", "fc.weight"} <= set(gn)


def test_shortcut_of_the_batch_norm_network_pads_on_both_sides():
    block = CifarResNet(8, width=4).layer2[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 8, 8)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_shortcut_of_the_group_norm_network_appends_zeros():
    block = ResNetGN(8, width=4, groups=2).layer2[0]
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 8, 8)
    y = block(x)
    mean = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(y[:, :4], mean)
    assert not y[:, 4:].any()


def test_group_norm_answers_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    network, x = ResNetGN(8, width=8).train(), torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(network(x)[:1], network(x[:1]))


def test_normalize():
    x = torch.rand(2, 3, 4, 4)
    normalize = Normalize([0.1, 0.2, 0.3], [1.0, 2.0, 4.0])
    torch.testing.assert_close(normalize(x)[:, 2], (x[:, 2] - 0.3) / 4.0)
    assert not normalize.state_dict()
    assert "0.5" in repr(Normalize([0.5], [0.25]))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: CifarResNet(depth=18), "depth=18"),
        (lambda: CifarResNet(depth=2), "depth=2"),
        (lambda: CifarResNet(width=15), "width=15"),
        (lambda: ResNetGN(depth=52), "depth=52"),
        (lambda: ResNetGN(width=12), "12 channels into 8 groups"),
        (lambda: Normalize([0.5, 0.5], [0.5]), "one length"),
        (lambda: Normalize([0.5], [0.0]), "positive"),
    ],
)
def test_what_cannot_be_built_is_said(make, found):
    with pytest.raises(ValueError, match=found):
        make()
