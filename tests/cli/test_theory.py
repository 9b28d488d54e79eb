"""The theory on the command line: a table, a picture, and what is said."""

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from testtime.cli import main

FEW = ["theory", "bias-variance", "--draws", "2000", "--angles", "0,0.6,uniform"]


def test_the_table_and_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(main, FEW)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    rows = [line.split() for line in lines[1:10]]
    assert [row[0] for row in rows] == [
        *("0", "bias", "variance"),
        *("0.6", "bias", "variance"),
        *("uniform", "bias", "variance"),
    ]
    assert all(len(line) <= 80 for line in lines[:10])
    assert float(rows[3][2]) == pytest.approx(0.63, abs=0.05)
    assert "2000 draws, seed 0; standard error of a risk at most" in result.output
    assert "0: best alpha 0; slope of the risk at 0 +2.523; u1 is not turned" in result.output
    assert "0.6: best alpha 0.1" in result.output
    assert "uniform: best alpha 0; the rotation is uniform" in result.output
    assert "No picture. The picture is drawn with matplotlib" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_was_asked_for_needs_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(main, [*FEW, "--out", str(tmp_path / "picture.png")])
    assert result.exit_code == 1
    assert "pip install 'testtime[report]'" in result.output


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, start in (("picture.svg", b"<?xml"), ("picture.png", b"\x89PNG")):
        path = tmp_path / name
        result = CliRunner().invoke(main, [*FEW, "--out", str(path)])
        assert result.exit_code == 0, result.output
        assert f"The picture is in {path}." in result.output.replace("\n", "")
        assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("angle", ["4", "-1", "steep", ""])
def test_a_shift_that_is_none(angle: str) -> None:
    result = CliRunner().invoke(main, ["theory", "bias-variance", "--angles", angle])
    assert result.exit_code == 2
    assert "A shift is an angle from 0 to pi" in result.output
