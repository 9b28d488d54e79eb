"""Models by name."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from testtime.models import CifarResNet
from testtime.models.load import load_model, short_name

FACTORY = """
from torch import nn

def model():
    return nn.Linear(2, 3)

def words():
    return "no model"
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "made_here.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    yield "made_here"
    sys.modules.pop("made_here", None)


def test_a_checkpoint_takes_images_and_normalises_them(tmp_path):
    network = CifarResNet(20).eval()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    model = load_model(f"resnet20:{tmp_path / 'weights.safetensors'}")
    images = torch.rand(2, 3, 32, 32)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    assert torch.equal(model(images), network((images - mean) / std))
    assert not model.training


def test_a_factory(factory):
    assert isinstance(load_model(f"{factory}:model"), nn.Linear)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("resnet20", "has no ':'"),
        ("resnet2:x", "There is no network 'resnet2'.* Did you mean 'resnet20'"),
        ("no_such_module:f", "cannot be called: No module named"),
        ("made_here:nothing", "cannot be called: .* has no attribute 'nothing'"),
        ("made_here:words", "returned str, not a torch.nn.Module"),
    ],
)
def test_what_cannot_be_loaded(spec, said, factory):
    with pytest.raises(ValueError, match=said):
        load_model(spec)


def test_files_that_do_not_hold_the_network(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_model(f"resnet20:{tmp_path / 'none'}")
    save_file(CifarResNet(8).state_dict(), tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for name in ("other", "torn"):
        with pytest.raises(ValueError, match="does not hold the weights of resnet20"):
            load_model(f"resnet20:{tmp_path / name}.safetensors")


def test_results_call_a_published_network_by_its_name_and_others_by_all_of_it():
    assert short_name("resnet20:somewhere/weights.safetensors") == "resnet20"
    assert short_name("timm:resnet50") == "timm:resnet50"
