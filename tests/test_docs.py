"""Every code block of README.md, CONTRIBUTING.md and docs/ runs, or at least could.

So do the examples in docstrings.
"""

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import types

import click
import pytest

import testtime
from tests.readme import ROOT, blocks, program
from tests.readme import main as run_readme
from testtime.cli import main

PAGES = [
    page
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
    if page.exists()
]


def at(page, line):
    return f"{page.relative_to(ROOT)}:{line}"


def commands(text):
    """The commands of a shell block, each as a list of words."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next(
                (i for i, word in enumerate(words) if re.match(r"[|;&<>]", word)), len(words)
            )
            yield words[:end]
            words = words[end + 1 :]


def shell_commands(program):
    """Every command of the pages that calls this program, with where it stands."""
    for page in PAGES:
        for block in blocks(page):
            for words in commands(block.text) if block.language == "sh" else ():
                while words and re.match(r"\w+=", words[0]):
                    words = words[1:]
                if words and words[0].rpartition("/")[2] == program:
                    yield pytest.param(words[1:], id=f"{at(page, block.line)} {shlex.join(words)}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks(page, tmp_path, monkeypatch):
    code = compile(program(page), page, "exec")
    # A module, so that what the page defines can be pickled and inspected as in a user's file.
    module = types.ModuleType(page.stem)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    exec(code, module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_that_are_only_shown_compile(page):
    for block in blocks(page):
        if block.language == "python" and not block.runs:
            compile(block.text, at(page, block.line), "exec")


MODULES = [module.name for module in pkgutil.walk_packages(testtime.__path__, "testtime.")]


@pytest.mark.parametrize("name", ["testtime", *MODULES])
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def parse(args):
    """Parse as `testtime` would, up to where values are looked at: they may be placeholders."""
    command, name = main, "testtime"
    context = click.Context(main, info_name=name)
    _, rest, _ = command.make_parser(context).parse_args(list(args))
    while rest and isinstance(command, click.Group):
        name, command, rest = command.resolve_command(context, rest)
        context = click.Context(command, parent=context, info_name=name)
        _, rest, _ = command.make_parser(context).parse_args(rest)
    if rest:
        raise click.UsageError(f"'{name}' takes no further argument '{rest[0]}'.")


@pytest.mark.parametrize("args", list(shell_commands("testtime")))
def test_testtime_commands_parse(args):
    parse(args)


def check_make(args):
    """Unknown targets and variables are refused; nothing is run."""
    # `make test` hands its own flags down to every make below it.
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL"}}
    done = subprocess.run(
        ["make", "--dry-run", *args], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in [arg.partition("=")[0] for arg in args if "=" in arg]:
        assert f"$({name})" in (ROOT / "Makefile").read_text(), f"the Makefile does not use {name}"


@pytest.mark.parametrize("args", list(shell_commands("make")))
def test_make_commands_exist(args):
    check_make(args)


# The rest holds the checks themselves to account: a check that finds nothing would pass for ever.

PAGE = """\
# Page

```python
x = 1
```
<!-- not run: it needs a download -->

```python
raise RuntimeError("run")
```
1. a list

   ```python
   if x == 1:
       y = x + 1
   ```

```text
nothing
```
"""


@pytest.fixture
def page(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path / "page.md"


def test_blocks_are_found(page):
    found = [(block.language, block.line, block.runs) for block in blocks(page)]
    assert found == [
        ("python", 4, True),
        ("python", 9, False),
        ("python", 14, True),
        ("text", 19, True),
    ]


def test_the_program_keeps_line_numbers(page):
    lines = program(page).splitlines()
    assert [(i, line) for i, line in enumerate(lines, 1) if line] == [
        (4, "x = 1"),
        (14, "if x == 1:"),
        (15, "    y = x + 1"),
    ]


def test_an_open_block_is_refused(page):
    page.write_text("```python\nx = 1\n")
    with pytest.raises(ValueError, match=r"page\.md:1: this block is never closed"):
        blocks(page)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (None, 1, "no python block"),
        ("words", 1, "no python block"),
        ("```python\nimport os\nassert not os.listdir()\n```", 0, "README.md's code ran."),
        ("```python\n\n1 / 0\n```", 1, "README.md's code failed."),
    ],
)
def test_readme_script(text, code, said, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("tests.readme.ROOT", tmp_path)
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert run_readme(sys.executable) == code
    printed = capfd.readouterr()
    assert said in printed.out
    if "failed" in said:
        assert 'README.md", line 3' in printed.err


def test_shell_lines_are_split():
    text = "A=1 testtime x  # why\ntesttime bench \\\n  --seed 1 > out && make test | head"
    assert list(commands(text)) == [
        ["A=1", "testtime", "x"],
        ["testtime", "bench", "--seed", "1"],
        ["out"],
        ["make", "test"],
        ["head"],
    ]


def test_parsing_accepts():
    for args in [[], ["--help"], ["--version"], ["--debug"]]:
        parse(args)


@pytest.mark.parametrize("args", [["no-command"], ["--no-option"]])
def test_parsing_refuses(args):
    with pytest.raises(click.UsageError):
        parse(args)


@pytest.mark.parametrize("args", [["no-target"], ["test", "NO_VARIABLE=1"]])
def test_make_refuses(args):
    with pytest.raises(AssertionError):
        check_make(args)
