"""Every family is read, told apart, joined and written back; what does not fit is refused."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from testtime.models.mae import (
    FAMILIES,
    MAE,
    MAEClassifier,
    Sizes,
    family_of,
    load_mae,
    read_checkpoint,
    read_state,
    save_mae,
)

ENCODER, DECODER, PROBE = Sizes(16, 2, 4), Sizes(8, 1, 2), Sizes(12, 1, 3)
HEADS = {"heads": 4, "decoder_heads": 2, "classifier_heads": 3}

MODELS: dict[str, MAE | MAEClassifier] = {
    "encoder": MAE(16, 4, ENCODER),
    "full": MAE(16, 4, ENCODER, DECODER, normalised=False),
    "vit-probe": MAE(16, 4, ENCODER, head=PROBE, classes=5),
    "linear-probe": MAE(16, 4, ENCODER, head="linear", classes=5),
    "ttt-vit": MAE(16, 4, ENCODER, DECODER, PROBE, classes=5, normalised=True),
    "ttt-linear": MAE(16, 4, ENCODER, DECODER, "linear", classes=5, normalised=True),
    "rotation": MAE(16, 4, ENCODER, DECODER, PROBE, classes=5, task="rotation"),
    "finetuned-mean": MAEClassifier(16, 4, ENCODER, "mean", classes=5),
    "finetuned-token": MAEClassifier(16, 4, ENCODER, "token", classes=5),
    "huggingface": MAE(16, 4, ENCODER, DECODER, normalised=True),
}


def write(model: MAE | MAEClassifier, folder: Path, family: str, suffix: str = ".pth") -> Path:
    path = folder / (family if family == "huggingface" else f"{family}{suffix}")
    save_mae(model, path, family)
    return path


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def test_there_is_a_model_of_every_family() -> None:
    assert set(MODELS) == set(FAMILIES)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_written_and_read(tmp_path: Path, family: str, suffix: str) -> None:
    model = MODELS[family].eval()
    path = write(model, tmp_path, family, suffix)
    held = read_checkpoint(path)
    assert held.family == family
    before = torch.get_rng_state()
    back = load_mae(path, **HEADS)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(back) is type(model)
    assert same(back, model)
    assert not back.training
    assert getattr(back, "normalised", None) == getattr(model, "normalised", None)
    fixed = [{k for k, p in m.named_parameters() if not p.requires_grad} for m in (back, model)]
    assert fixed[0] == fixed[1]
    again = write(back, tmp_path, family, suffix)
    assert read_checkpoint(again).as_written().keys() == held.as_written().keys()


@pytest.mark.parametrize("spelling", ["hub", "memory", "saved"])
def test_the_spellings_of_hugging_face(tmp_path: Path, spelling: str) -> None:
    model = MODELS["huggingface"]
    save_mae(model, tmp_path, "huggingface", spelling)  # type: ignore[arg-type]
    held = read_checkpoint(tmp_path)
    assert held.spelling == spelling
    assert held.as_written().keys() == load_file(tmp_path / "model.safetensors").keys()
    assert same(load_mae(tmp_path), model)  # the configuration gives the heads


def test_a_hugging_face_encoder_alone(tmp_path: Path) -> None:
    save_mae(MODELS["encoder"], tmp_path, "huggingface")
    state = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("vit."): tensor for name, tensor in state.items()}
    save_file(bare, tmp_path / "model.safetensors")
    assert same(load_mae(tmp_path), MODELS["encoder"])


def test_training_checkpoints_of_the_authors(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-799.pth"
    arguments = argparse.Namespace(norm_pix_loss=True, model="mae_vit_large_patch16")
    held = {"model": MODELS["full"].state_dict(), "optimizer": {}, "epoch": 799, "args": arguments}
    torch.save(held, path)
    mae = load_mae(path, **HEADS)
    assert mae.normalised is True


def test_a_wrong_declaration_is_refused(tmp_path: Path, plain: MAE) -> None:
    save_mae(plain, tmp_path / "visualize.pth", "full")
    with pytest.raises(ValueError, match="declared to predict normalised pixels"):
        load_mae(tmp_path / "visualize.pth", heads=4, decoder_heads=4, normalised=True)
    torch.save({"model": plain.state_dict()}, tmp_path / "undeclared.pth")
    mae = load_mae(tmp_path / "undeclared.pth", heads=4, decoder_heads=4)
    assert mae.normalised is False


def test_decoder_and_probe_are_joined(tmp_path: Path) -> None:
    for head in ("vit", "linear"):
        whole = MODELS[f"ttt-{head}"]
        full, probe = tmp_path / "full.pth", tmp_path / "probe.pth"
        save_mae(whole, full, "full")
        save_mae(whole, probe, f"{head}-probe")
        assert same(load_mae(full, probe=probe, **HEADS), whole)


def test_a_linear_probe_without_its_count(tmp_path: Path) -> None:
    save_mae(MODELS["linear-probe"], tmp_path / "probe.pth", "linear-probe")
    held = torch.load(tmp_path / "probe.pth")
    del held["model"]["head.0.num_batches_tracked"]
    torch.save(held, tmp_path / "probe.pth")
    assert same(load_mae(tmp_path / "probe.pth", **HEADS), MODELS["linear-probe"])


def test_a_probe_of_another_encoder_is_refused(tmp_path: Path) -> None:
    save_mae(MODELS["full"], tmp_path / "full.pth")
    save_mae(MODELS["vit-probe"], tmp_path / "probe.pth")
    with pytest.raises(ValueError, match=r"trained on another encoder: .* differs"):
        load_mae(tmp_path / "full.pth", probe=tmp_path / "probe.pth", **HEADS)
    save_mae(MODELS["encoder"], tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match="family 'encoder' was given"):
        load_mae(tmp_path / "full.pth", probe=tmp_path / "encoder.pth", **HEADS)


def test_a_decoder_of_another_width_is_refused() -> None:
    state = MODELS["full"].state_dict()
    state["decoder_embed.weight"] = torch.zeros(8, 12)
    with pytest.raises(ValueError, match=r"do not fit .* decoder_embed\.weight"):
        load_mae(read_state(state), **HEADS)


def test_a_file_that_lacks_a_block_or_a_size_is_refused() -> None:
    state = MODELS["full"].state_dict()
    torn = {k: t for k, t in state.items() if k != "blocks.1.mlp.fc1.bias"}
    with pytest.raises(ValueError, match=r"Missing key.*blocks\.1\.mlp\.fc1\.bias"):
        load_mae(read_state(torn), **HEADS)
    del state["patch_embed.proj.weight"]
    with pytest.raises(ValueError, match=r"lacks \['patch_embed\.proj\.weight'\]"):
        load_mae(read_state(state), **HEADS)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["conv1.weight", "fc.weight"], "parts none, and conv1.weight, fc.weight. Not found"),
        (["module.cls_token"], "module.cls_token"),
        (["cls_token", "blocks.0.norm1.weight", "decoder_embed.weight"], "decoder, encoder"),
        ([], "nothing"),
    ],
)
def test_what_is_of_no_family_is_described(names: list[str], said: str) -> None:
    with pytest.raises(ValueError, match="no checkpoint of a masked autoencoder") as error:
        family_of(names)
    assert said in str(error.value)


def test_a_supervised_vit_of_hugging_face_is_named() -> None:
    with pytest.raises(ValueError, match="ViTForImageClassification"):
        family_of(["vit.embeddings.cls_token", "classifier.weight"])


def test_heads_that_are_nowhere_are_asked_for() -> None:
    held = read_state(MODELS["full"].state_dict())
    with pytest.raises(ValueError, match=r"2 blocks of width 16. Pass heads="):
        load_mae(held)
    with pytest.raises(ValueError, match=r"Pass decoder_heads="):
        load_mae(held, heads=4)
    assert load_mae(read_state(MODELS["encoder"].state_dict()), heads=2).sizes.heads == 2


def test_a_rectangle_is_asked_for() -> None:
    state = MAE((8, 12), 4, ENCODER).state_dict()
    with pytest.raises(ValueError, match=r"6 patches are not in a square.*image="):
        load_mae(read_state(state), heads=4)
    assert load_mae(read_state(state), heads=4, image=(8, 12)).grid == (2, 3)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        read_checkpoint(tmp_path)
    for name in ("torn.pth", "torn.safetensors"):
        (tmp_path / name).write_bytes(b"no weights in here")
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read_checkpoint(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"holds no weights: .* found epoch"):
        read_checkpoint(tmp_path / "empty.pth")


class Harmful:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("opened",))


def test_no_code_in_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": MODELS["encoder"].state_dict(), "args": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        read_checkpoint(tmp_path / "bad.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("family", ["full", "ttt-vit", "nonsense"])
def test_a_part_that_is_lacking_cannot_be_written(tmp_path: Path, family: str) -> None:
    with pytest.raises(ValueError, match=f"'encoder' cannot be written as '{family}'"):
        save_mae(MODELS["encoder"], tmp_path / "file.pth", family)
    assert not (tmp_path / "file.pth").exists()


def test_what_hugging_face_has_no_place_for(tmp_path: Path) -> None:
    for model, said in (
        (MODELS["rotation"], "does not"),
        (MODELS["finetuned-mean"], "does not"),
        (MAE((8, 12), 4, ENCODER), "square"),
        (MAE(16, 4, ENCODER, DECODER), "not known"),
    ):
        with pytest.raises(ValueError, match=said):
            save_mae(model, tmp_path / "hub", "huggingface")
    assert not (tmp_path / "hub").exists()


def test_the_state_given_is_not_shared() -> None:
    state: dict[str, Tensor] = MODELS["encoder"].state_dict()
    mae = load_mae(read_state(state), heads=4)
    before = state["cls_token"].clone()
    with torch.no_grad():
        mae.cls_token.add_(1)
    assert torch.equal(state["cls_token"], before)


def test_the_declaration_is_beside_the_weights(tmp_path: Path) -> None:
    save_mae(MODELS["huggingface"], tmp_path, "huggingface")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["norm_pix_loss"] is True
    assert config["layer_norm_eps"] == 1e-6
