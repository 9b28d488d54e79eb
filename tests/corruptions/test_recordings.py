"""The command that judges recordings, and what it reckons with."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.corruptions.__main__ import OUTSIDE, UNKNOWN, WITHIN, judge_exact, main
from tests.corruptions.figures import figures, rings
from tests.corruptions.images import read_images
from testtime.shifts import CORRUPTIONS, corrupt
from testtime.shifts.corruptions.filters import cut

EXACT = Path(__file__).parents[1] / "goldens" / "corruptions_exact.npz"
LEVELS = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(3)).byte()


with np.load(EXACT) as file:
    OUTPUTS = [key for key in file.files if key.split("_")[0] not in ("seed", "clean", "part")]
    OUTPUTS = [key for key in OUTPUTS if not key.startswith("frost_texture")]


@pytest.fixture(scope="module")
def golden():
    with np.load(EXACT) as file:
        return dict(file)


@pytest.mark.parametrize("key", OUTPUTS)
def test_the_recorded_output_comes_out(golden, key):
    others = {other: array for other, array in golden.items() if other not in OUTPUTS}
    ((label, code, said),) = judge_exact(others | {key: golden[key]}, None)
    assert label == key
    assert code == WITHIN, said


def test_every_corruption_has_recorded_outputs():
    assert all(f"{name}_32_3" in OUTPUTS for name in CORRUPTIONS)


@pytest.fixture
def recording(tmp_path):
    """Figures recorded from this library itself, of contrast at severity 2, and the images."""
    images = tmp_path / "images.npy"
    np.save(images, LEVELS.permute(0, 2, 3, 1).numpy())
    found = figures(cut(corrupt(LEVELS / 255, "contrast", 2)), LEVELS)
    goldens = {
        "size": 32,
        "images": "random levels",
        "images_sha256": sha256(np.load(images)).hexdigest(),
        "n_images": len(LEVELS),
        "figures": list(found),
        "corruptions": {
            "contrast": {
                "runs": 1,
                "severities": {"2": {"value": list(found.values()), "tol": [1e-6] * len(found)}},
            }
        },
    }

    def judge(**changes):
        path = tmp_path / "figures.json"
        path.write_text(json.dumps(goldens | changes))
        return main(["--goldens", str(path), "--images", str(images)])

    return goldens, judge


def test_figures_within_give_0(recording, capsys):
    assert recording[1]() == WITHIN
    assert capsys.readouterr().out.startswith("contrast 2                   within: ")


def test_a_figure_outside_gives_1_and_is_named(recording, capsys):
    goldens, judge = recording
    goldens["corruptions"]["contrast"]["severities"]["2"]["value"][0] += 1e-3
    assert judge() == OUTSIDE
    assert "OUTSIDE: 1 figures, mean_r at" in capsys.readouterr().out


def test_other_images_and_unknown_names_are_not_judged(recording, capsys):
    goldens, judge = recording
    assert judge(images_sha256="0" * 64) == UNKNOWN
    assert "recorded on other images (random levels)" in capsys.readouterr().out
    assert judge(corruptions={"sepia": goldens["corruptions"]["contrast"]}) == UNKNOWN


def test_frost_with_made_textures_is_not_judged(recording, monkeypatch, capsys):
    goldens, judge = recording
    monkeypatch.setattr("tests.corruptions.__main__.find_textures", lambda: "procedural")
    assert judge(corruptions={"frost": goldens["corruptions"]["contrast"]}) == UNKNOWN
    assert "needs the files of imgcorr" in capsys.readouterr().out


def test_what_cannot_be_read_is_not_judged(tmp_path, capsys):
    (tmp_path / "figures.json").write_text("{}")
    assert main(["--goldens", str(tmp_path / "figures.json"), "--images", "nowhere"]) == UNKNOWN
    assert main(["--goldens", str(tmp_path / "none.npz")]) == UNKNOWN
    assert "not judged" in capsys.readouterr().out


def test_images_are_read_from_folders_arrays_and_crops(tmp_path):
    from PIL import Image

    array = LEVELS.permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "images.npy", array)
    (tmp_path / "folder").mkdir()
    for i, pixels in enumerate(array):
        Image.fromarray(pixels).save(tmp_path / "folder" / f"{i}.png")
    assert torch.equal(read_images(str(tmp_path / "folder")), LEVELS)
    assert torch.equal(read_images(f"{tmp_path}/images.npy[1:3]"), LEVELS[1:3])
    crop = read_images(f"crops:16:{tmp_path}/folder/2.png@4,8")
    assert torch.equal(crop, LEVELS[2:3, :, 4:20, 8:24])


def test_figures_of_an_unchanged_image():
    found = figures(LEVELS, LEVELS)
    assert found["mse"] == found["mad"] == found["shift2"] == found["pair_corr"] == 0
    assert found["psnr"] == pytest.approx(60)
    assert found["ssim"] == pytest.approx(1)
    assert found["corr"] == pytest.approx(1)
    assert sum(found[f"hist_{k:02}"] for k in range(32)) == pytest.approx(1)
    assert found["mean_g"] == pytest.approx(float(LEVELS[:, 1].double().mean()) / 255)


def test_rings_add_up_to_the_variance():
    difference = torch.rand(3, 24, 30, dtype=torch.float64)
    variance = difference.flatten(1).var(1, correction=0)
    torch.testing.assert_close(rings(difference).sum(1), variance)


def test_one_shift_for_a_whole_batch_shows_as_pair_correlation():
    pattern = torch.randint(-9, 9, (1, 3, 32, 32))
    moved = (LEVELS.int().clamp(20, 230) + pattern).byte()
    assert figures(moved, LEVELS.clamp(20, 230))["pair_corr"] == pytest.approx(1)
