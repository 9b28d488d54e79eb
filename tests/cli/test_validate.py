"""`testtime validate`: what it shows and its exit codes."""

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from testtime import cli
from testtime.adaptation.methods import METHODS
from testtime.models.tiny import tiny

HERE = __name__


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks gain nothing from a second thread, and lose time to it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*args):
    return CliRunner().invoke(cli.main, ["validate", *args], prog_name="testtime")


def sound():
    return tiny("groupnorm")


def alone():
    return nn.Sequential(tiny("groupnorm")[0]).eval()


class Noted(nn.Module):
    """A model with a state of its own, which no reset reaches."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = tiny("groupnorm")[0], []

    def forward(self, x):
        self.calls.append(None)
        return self.inner(x) * len(self.calls)


def unsound():
    return Noted(), tiny("groupnorm")[1]


def no_model():
    return torch.zeros(3)


def test_tiny_networks_of_every_kind():
    result = run("--method", "source")
    assert result.exit_code == 0
    assert "The laws under source" in result.stdout
    assert "transformer" in result.stdout
    assert "NO" not in result.stdout


@pytest.mark.parametrize("factory", ["sound", "alone"])
def test_a_model_that_keeps_the_laws(factory):
    result = run("--method", "tent", "--method", "source", "--model", f"{HERE}:{factory}")
    assert result.exit_code == 0, result.stdout
    assert "The laws under tent" in result.stdout
    assert "The laws under source" in result.stdout


def test_a_broken_law_is_exit_code_1():
    result = run("--method", "tent", "--model", f"{HERE}:unsound")
    assert result.exit_code == 1
    assert "NO" in result.stdout
    assert "broken, law 3, a reset is exact" in " ".join(result.stdout.split())


def test_a_method_that_does_not_fit_holds():
    result = run("--method", "bn", "--model", f"{HERE}:sound")
    assert result.exit_code == 0
    assert "BNAdapt finds nothing to adapt" in " ".join(result.stdout.split())


def test_all_methods():
    result = run("--all", "--model", f"{HERE}:sound")
    assert result.exit_code == 0
    assert result.stdout.count("The laws under") == len(METHODS)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "Give either --method or --all"),
        (("--all", "--method", "tent"), "Give either --method or --all"),
        (("--method", "tnet"), "Did you mean 'tent'?"),
        (("--method", "tent", "--model", "nowhere:factory"), "cannot be called"),
        (("--method", "tent", "--model", f"{HERE}:no_model"), "not a torch.nn.Module"),
    ],
)
def test_bad_usage_is_exit_code_2(args, words):
    result = run(*args)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
