"""The group of commands: what it lists, what it loads, how it fails."""

import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from testtime import cli

COMMAND = '''
"""Greet a name, or fail.

More words, which the list does not show.
"""
import sys
sys.modules["{mark}"] = sys
import click

@click.command()
@click.argument("name")
@click.option("--times", default=1)
def command(name, times):
    """Greet."""
    failures = {{
        "value": ValueError("The value was wrong:\\n 3 was found."),
        "bare": RuntimeError(),
        "bug": AttributeError("a bug"),
        "extra": ImportError("Install testtime[data]."),
    }}
    if name == "missing":
        open("/does/not/exist")
    if name == "full":
        raise OSError(28, "No space left on device")
    if name in failures:
        raise failures[name]
    if name == "quit":
        click.get_current_context().exit(1)
    click.echo(f"hello {{name}}" * times)
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `testtime` with one more command, `say-hello`."""
    mark = f"loaded_{tmp_path.name}"
    (tmp_path / "say_hello.py").write_text(COMMAND.format(mark=mark))
    (tmp_path / "_private.py").write_text("raise AssertionError")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])

    def run(*args):
        result = CliRunner().invoke(cli.main, args, prog_name="testtime")
        result.loaded = sys.modules.pop(mark, None) is not None
        return result

    yield run
    sys.modules.pop("testtime.cli.say_hello", None)


def test_a_file_is_a_command(run):
    result = run("say-hello", "you")
    assert (result.exit_code, result.stdout) == (0, "hello you\n")


def test_the_list_is_read_without_loading(run):
    result = run("--help")
    assert result.exit_code == 0
    assert "say-hello  Greet a name, or fail.\n" in result.stdout
    assert "private" not in result.stdout
    assert not result.loaded


def test_help_of_a_command(run):
    result = run("say-hello", "--help")
    assert result.exit_code == 0
    assert "Usage: testtime say-hello [OPTIONS] NAME" in result.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("value", "Error: The value was wrong: 3 was found.\n"),
        ("missing", "Error: No such file or directory: '/does/not/exist'\n"),
        ("full", "Error: No space left on device\n"),
        ("bare", "Error: RuntimeError\n"),
        ("extra", "Error: Install testtime[data].\n"),
    ],
)
def test_failures_are_one_sentence_and_exit_code_1(run, name, message):
    result = run("say-hello", name)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)


def test_debug_shows_the_traceback(run):
    assert isinstance(run("--debug", "say-hello", "value").exception, ValueError)


def test_a_bug_is_not_dressed_up(run):
    assert isinstance(run("say-hello", "bug").exception, AttributeError)


def test_a_command_chooses_its_exit_code(run):
    result = run("say-hello", "quit")
    assert (result.exit_code, result.stderr) == (1, "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("say-helo",), "There is no command 'say-helo'. Did you mean 'say-hello'?"),
        (("zzz",), "There is no command 'zzz'.\n"),
        (("--nothing",), "--nothing"),
        (("say-hello",), "Missing argument 'NAME'"),
        (("say-hello", "you", "--time", "2"), "--times"),
        (("say-hello", "you", "--times", "x"), "'x' is not a valid integer"),
    ],
)
def test_bad_usage_is_exit_code_2(run, args, message):
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_version(run):
    import testtime

    assert run("--version").stdout == f"testtime {testtime.__version__}\n"


def test_every_command_has_a_help_line_and_a_command():
    for name in cli.main.list_commands(None):
        assert cli._help_line(name), f"cli/{name}.py needs a docstring"
        assert cli.main.get_command(None, name) is not None


def every_help():
    return [["--help"], *([name, "--help"] for name in cli.main.list_commands(None))]


@pytest.mark.parametrize("args", every_help(), ids=" ".join)
def test_help_is_quick_and_loads_nothing_heavy(args):
    code = (
        "import sys\nfrom testtime.cli import main\n"
        f"try: main({args})\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):  # the quickest of three: other work on the machine is not ours
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
    assert done.stdout.startswith("Usage:")
    assert not {"torch", "rich", "numpy"} & set(done.stderr.split())
    assert min(seconds) < 0.5


def test_methods_are_listed_and_each_has_a_card():
    from testtime.adaptation.methods import METHODS

    listed = CliRunner().invoke(cli.main, ["methods"], terminal_width=200)
    assert listed.exit_code == 0, listed.output
    for name in METHODS:
        assert name in listed.output
        card = CliRunner().invoke(cli.main, ["methods", name])
        assert card.exit_code == 0, card.output
        assert f"{METHODS[name].__name__}(" in card.output
        assert f"answers    {METHODS[name]().answers}" in card.output
        assert all(f"preset     {preset}: " in card.output for preset in METHODS[name].presets)
    unknown = CliRunner().invoke(cli.main, ["methods", "tnet"])
    assert unknown.exit_code == 2
    assert "Did you mean 'tent'" in unknown.output
