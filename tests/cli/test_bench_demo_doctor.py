"""The commands as a user runs them."""

import json

import pytest
from click.testing import CliRunner

from testtime.cli import main


def invoke(*words):
    return CliRunner().invoke(main, words)


@pytest.fixture
def factory(tmp_path, monkeypatch):
    code = "from testtime import demo\ndef model(): return demo.load('resnet_bn')[0]\n"
    code += "def both(): return demo.load('resnet_gn')[0], demo.load()[1][:8]\n"
    (tmp_path / "my_models.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return "my_models"


def test_bench(factory, tmp_path):
    done = invoke(
        *("bench", "--model", f"{factory}:model", "--data", "digits", "--batch-size", "200"),
        *("--methods", "source,bn", "--shifts", "clean,contrast:5"),
    )
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [(row["shift"], row["method"]) for row in rows] == [
        ("clean", "source"),
        ("clean", "bn"),
        ("contrast", "source"),
        ("contrast", "bn"),
    ]
    errors = [row["error"] for row in rows]
    assert errors[2] > 0.8 > 0.3 > errors[3]
    assert f"{100 * errors[3]:.2f}" in done.output
    assert "The rows are in bench.jsonl" in done.output


def test_bench_names_the_methods_that_do_not_fit(factory):
    done = invoke("bench", "--model", f"{factory}:both", "--data", "digits")
    assert done.exit_code == 0, done.output
    assert "BNAdapt finds nothing to adapt" in " ".join(done.output.split())
    assert "tent" in done.output


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["bench", "--data", "digits"], 2, "Missing option '--model'"),
        (["bench", "--model", "x:y", "--data", "digits"], 1, "cannot be called"),
        (["bench", "--model", "my_models:model", "--data", "cifar10:no"], 1, "There is no file no"),
        (
            ["bench", "--model", "my_models:model", "--data", "digits", "--methods", "tnet"],
            2,
            "'tent'",
        ),
        (["doctor"], 2, "Missing option '--model'"),
    ],
)
def test_bad_usage(words, code, said, factory):
    done = invoke(*words)
    assert done.exit_code == code
    assert said in done.output
    assert "Traceback" not in done.output


def test_demo():
    done = invoke("demo")
    assert done.exit_code == 0, done.output
    assert "Error in %: 797 images" in done.output
    assert "resnet_bn" in done.output
    assert "Not run on resnet_gn: BNAdapt finds nothing to adapt" in " ".join(done.output.split())


def test_doctor(factory):
    done = invoke("doctor", "--model", f"{factory}:model", "--data", "digits")
    assert done.exit_code == 0, done.output
    assert "fits  tent" in done.output
    done = invoke("doctor", "--model", f"{factory}:both")
    assert "no    bn" in done.output
    assert "one step moved logits" in done.output
