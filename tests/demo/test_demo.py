import re
from importlib.resources import files

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from testtime import demo
from testtime.demo import MODELS, SPLIT, digits, load
from testtime.demo import train as recipe


def stated_accuracy(model):
    page = files("testtime.demo").joinpath("DIGITS.md").read_text(encoding="utf-8")
    return float(re.search(rf"{model}\.safetensors .* ([\d.]+) %", page)[1]) / 100


def test_images_are_what_a_network_takes():
    for split, count in [("train", 1000), ("test", 797)]:
        images, labels = digits(split)
        assert images.shape == (count, 3, 32, 32)
        assert images.dtype == torch.float32
        assert (images.min(), images.max()) == (0, 1)
        assert torch.equal(images[:, 0], images[:, 2])
        assert labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(10))


def test_the_split_is_the_one_that_is_stated():
    page = files("testtime.demo").joinpath("DIGITS.md").read_text(encoding="utf-8")
    assert SPLIT == "digits-1797: 1000 train / 797 test, seed 0"
    assert SPLIT in page
    assert digits("train")[1][:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]
    assert digits("test")[1][:10].tolist() == [2, 1, 9, 2, 3, 1, 7, 7, 4, 5]


def test_the_file_holds_the_digits_of_scikit_learn():
    source = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.RandomState(0).permutation(1797)
    stored = demo._read("digits")
    assert np.array_equal(stored["images"].numpy(), source.images[order])
    assert np.array_equal(stored["labels"].numpy(), source.target[order])


@pytest.mark.parametrize("model", MODELS)
def test_shipped_weights_have_the_stated_accuracy(model):
    network, images, labels = load(model)
    assert not network.training
    with torch.no_grad():
        accuracy = (network(images).argmax(1) == labels).double().mean()
    # One image is 0.13 points: room for another order of summation.
    assert accuracy == pytest.approx(stated_accuracy(model), abs=0.002)


def test_each_call_gives_a_network_of_its_own():
    first, second = load()[0], load()[0]
    nn.init.zeros_(first.conv1.weight)
    assert second.conv1.weight.any()


@pytest.mark.parametrize("model", MODELS)
def test_the_recipe_still_reaches_the_shipped_accuracy(model):
    state = torch.get_rng_state()
    network = recipe.train(model)
    assert not network.training
    assert recipe.accuracy(network) == pytest.approx(stated_accuracy(model), abs=0.015)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_command_prints_and_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "EPOCHS", 1)
    out = tmp_path / "weights"
    result = CliRunner().invoke(recipe.main, ["--model", "resnet_gn", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"resnet_gn: [\d.]+ % of 797 test digits\n", result.output)
    assert [path.name for path in out.iterdir()] == ["resnet_gn.safetensors"]


def test_unknown_names_are_said():
    with pytest.raises(ValueError, match=r"known: resnet_bn, resnet_gn.* Did you mean 'resnet_bn'"):
        load("resnet_bm")
    with pytest.raises(ValueError, match="There is no demo model 'vit'"):
        load("vit")
    with pytest.raises(ValueError, match="found 'validation'"):
        digits("validation")
