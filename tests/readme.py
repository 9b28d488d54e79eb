"""The code blocks of a Markdown page, and README.md's run by another interpreter.

    python -m tests.readme PYTHON

runs README.md's python blocks under PYTHON, in an empty folder. It needs nothing installed, so that
`make wheel` can use it.
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

# The program reads the blocks and compiles them under the page's name: an error shows its line.
RUN = "import sys; exec(compile(sys.stdin.read(), sys.argv[1], 'exec'))"


@dataclass(frozen=True)
class Block:
    language: str
    line: int  # of the page, where the code begins; the first line is 1
    text: str
    runs: bool  # False under a comment `<!-- not run: reason -->`


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, from top to bottom."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    above = ""  # the nearest line above that is not blank
    number = 0
    while number < len(lines):
        fence = re.match(r"( *)(```+|~~~+) *(\w*)", lines[number])
        if not fence:
            above = lines[number].strip() or above
            number += 1
            continue
        indent, mark, language = fence.groups()
        start = end = number + 1
        while end < len(lines) and not re.fullmatch(rf" *{mark}{mark[0]}* *", lines[end]):
            end += 1
        if end == len(lines):
            raise ValueError(f"{page.name}:{start}: this block is never closed; end it with {mark}")
        # A block inside a list is indented with it.
        code = [line.removeprefix(indent) for line in lines[start:end]]
        runs = not re.fullmatch(r"<!-- not run: \S.* -->", above)
        found.append(Block(language, start + 1, "\n".join(code), runs))
        above, number = "", end + 1
    return found


def program(page: Path) -> str:
    """The python blocks that run, as one program in which every line keeps its number."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language == "python" and block.runs:
            lines += [""] * (block.line - 1 - len(lines))
            lines += block.text.splitlines()
    return "\n".join(lines)


def main(python: str) -> int:
    """Run README.md; the exit code is 0 if all of it ran."""
    page = ROOT / "README.md"
    code = program(page) if page.exists() else ""
    if not code:
        print("README.md has no python block to run; it must show how the package is used.")
        return 1
    # Not this repository's package but the one that is installed there.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [python, "-c", RUN, str(page)], input=code, text=True, cwd=empty, env=environment
        )
    print("README.md's code", "ran." if done.returncode == 0 else "failed.")
    return 1 if done.returncode else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Give one interpreter: python -m tests.readme PYTHON")
    sys.exit(main(os.path.abspath(sys.argv[1])))
