"""The commands as a user runs them."""

import pytest
from click.testing import CliRunner

from testtime.bench import Ledger
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
    ledger = Ledger.read(tmp_path / "bench.jsonl")
    assert [(row["spec"]["shifts"], row["spec"]["method"]) for row in ledger] == [
        (["clean"], "source"),
        (["clean"], "bn"),
        (["contrast:5"], "source"),
        (["contrast:5"], "bn"),
    ]
    errors = [row["results"]["error"] for row in ledger]
    assert errors[2] > 0.8 > 0.3 > errors[3]
    assert f"{100 * errors[3]:.2f}" in done.output
    assert "The rows are in bench.jsonl" in done.output
    again = invoke(
        "bench", "--model", f"{factory}:model", "--data", "digits", "--batch-size", "9,x"
    )
    assert again.exit_code == 2
    assert "'9,x' is no list of whole numbers" in again.output


def test_the_ledger_of_a_bench_is_shown_checked_and_reported(factory, tmp_path):
    call = ["bench", "--model", f"{factory}:model", "--data", "digits", "--images", "64"]
    assert invoke(*call, "--out", "one.jsonl", "--methods", "source").exit_code == 0
    assert invoke(*call, "--out", "two.jsonl", "--methods", "bn").exit_code == 0
    shown = invoke("ledger", "one.jsonl", "two.jsonl", "--columns", "spec.method,results.error")
    assert shown.exit_code == 0, shown.output
    assert "2 rows." in shown.output
    assert "source" in shown.output
    some = invoke("ledger", "one.jsonl", "two.jsonl", "--where", "spec.method=bn", "--csv", "a.csv")
    assert some.exit_code == 0, some.output
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2
    assert invoke("ledger", "one.jsonl", "--where", "spec.metod=bn").exit_code == 2
    assert invoke("ledger", "one.jsonl", "--check").exit_code == 0
    (tmp_path / "one.jsonl").write_text((tmp_path / "one.jsonl").read_text().replace("64", "65"))
    edited = invoke("ledger", "one.jsonl")
    assert edited.exit_code == 1
    assert "changed after it was written" in edited.output
    table = invoke("report", "two.jsonl", "--format", "md")
    assert "| `bn` |" in table.output
    page = invoke("report", "two.jsonl")
    assert page.exit_code == 0, page.output
    assert "Lowest error: bn" in (tmp_path / "two.html").read_text()


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
    assert "797 images" in " ".join(done.output.split())
    assert "resnet_bn" in done.output
    assert "bn failed: ValueError: BNAdapt finds nothing" in " ".join(done.output.split())


def test_doctor(factory):
    done = invoke("doctor", "--model", f"{factory}:model", "--data", "digits")
    assert done.exit_code == 0, done.output
    assert "fits  tent" in done.output
    done = invoke("doctor", "--model", f"{factory}:both")
    assert "no    bn" in done.output
    assert "one step moved logits" in done.output
