"""`testtime corrupt`: what it writes and says, and its exit codes."""

import json

import pytest
from click.testing import CliRunner

from testtime import cli
from testtime.shifts.corruptions import CONSTANTS

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def source(tmp_path, monkeypatch):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for name in ("a.png", "b.jpg"):
        Image.effect_noise((20, 18), 64).convert("RGB").save(tmp_path / "photos" / "cat" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def run(*args):
    return CliRunner().invoke(cli.main, ["corrupt", *args], prog_name="testtime")


def made(folder):
    return sorted(
        path.parent.parent.relative_to(folder).as_posix() for path in folder.rglob("a.png")
    )


def test_types_and_severities(source, tmp_path):
    result = run("photos", "out", "--type", "fog,contrast", "--severity", "1-2,5")
    assert result.exit_code == 0, result.output
    assert made(tmp_path / "out") == [
        *("contrast/1", "contrast/2", "contrast/5", "fog/1", "fog/2", "fog/5")
    ]
    assert "12 files were written to out, 0 were there; out/manifest.jsonl says" in result.stdout
    result = run("photos", "out", "--type", "fog", "--type", "contrast", "--severity", "5")
    assert "0 files were written to out, 4 were there" in result.stdout
    lines = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    assert {json.loads(line)["table"] for line in lines[1:]} == {"cifar"}


def test_all_types(source, tmp_path):
    options = (
        "--severity",
        "3",
        "--seed",
        "4",
        "--table",
        "imagenet",
        "--resize",
        "20",
        "--crop",
        "16",
    )
    result = run("photos", "out", "--type", "all", *options)
    assert result.exit_code == 0, result.output
    assert made(tmp_path / "out") == sorted(f"{name}/3" for name in CONSTANTS)
    with Image.open(tmp_path / "out" / "fog" / "3" / "cat" / "b.jpg") as image:
        assert image.size == (16, 16)


def test_the_list_has_a_line_for_each():
    result = run("--list")
    assert result.exit_code == 0
    rows = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == list(CONSTANTS)
    assert all(len(row) == 2 for row in rows)


def test_broken_images_are_named_and_counted(source):
    (source / "cat" / "broken.png").write_bytes(b"no image")
    result = run("photos", "out", "--type", "fog")
    assert result.exit_code == 0
    assert "Left out: cat/broken.png is not a whole image" in result.stderr
    assert "1 images were left out." in result.stderr
    assert "10 files were written" in result.stdout
    result = run("photos", "out", "--type", "fog", "--strict")
    assert result.exit_code == 1
    assert "cat/broken.png is not a whole image" in result.stderr


def test_another_run_is_refused(source):
    run("photos", "out", "--type", "fog")
    result = run("photos", "out", "--type", "fog", "--seed", "1")
    assert result.exit_code == 1
    assert "out holds another run: seed 0, now 1. Name a new folder." in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("photos", "out"), 2, "Missing option '--type'"),
        (("photos", "--type", "fog"), 2, "Missing argument 'OUT'"),
        (("photos", "out", "--type", "fgo"), 2, "Did you mean 'fog'?"),
        (("photos", "out", "--type", "fog", "--severity", "0-5"), 2, "no severity from 1 to 5"),
        (("photos", "out", "--type", "fog", "--severity", "5-1"), 2, "no severity from 1 to 5"),
        (("photos", "out", "--type", "fog", "--severity", "12"), 2, "no severity from 1 to 5"),
        (("photos", "out", "--type", "fog", "--severity", ""), 2, "no severity from 1 to 5"),
        (("photos", "out", "--type", "fog", "--crop", "0"), 2, "--crop"),
        (("none", "out", "--type", "fog"), 1, "There is no folder none"),
    ],
)
def test_bad_usage(source, tmp_path, args, code, said):
    result = run(*args)
    assert result.exit_code == code
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_page_shows_one_image_under_each(source, tmp_path):
    result = run("photos/cat/a.png", "page.png", "--picture", "--type", "fog,contrast")
    assert result.exit_code == 0, result.output
    assert run("photos/cat/a.png", "all.png", "--picture").exit_code == 0
    with Image.open(tmp_path / "page.png") as some, Image.open(tmp_path / "all.png") as every:
        assert every.height > some.height
    result = run("photos", "page.png", "--picture")
    assert result.exit_code == 2
    assert "--picture takes one image, but photos is no file" in result.output
