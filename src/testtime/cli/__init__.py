"""The command line: one file of this folder is one command.

A command's file has a docstring whose first line is its line in `testtime --help`, and a click
command named `command`. Its name is the file's, with hyphens for underscores. `testtime --help`
reads these files without running them; still, what is slow to load (torch, rich) is imported inside
the function, so that `testtime NAME --help` answers at once too.

Exit codes: 0 done, 1 failed, 2 bad usage.
"""

import ast
import importlib
import importlib.util
import pkgutil
import warnings
from pathlib import Path
from typing import Any

import click

from testtime._suggest import suggest


class Commands(click.Group):
    """A click group whose commands are the files of this folder, each loaded when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands' names, sorted."""
        modules = pkgutil.iter_modules(__path__)
        return sorted(m.name.replace("_", "-") for m in modules if not m.name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, which loads its file, or None."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(_module(cmd_name)).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, but an unknown command is answered with the nearest one."""
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"There is no command '{name}'.{suggest(name, known)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without loading any."""
        rows = [(name, _help_line(name)) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; the library's errors become one sentence and exit code 1."""
        try:
            return super().invoke(ctx)
        # Both are RuntimeErrors of click's own, and a closed pipe (`testtime ... | head`) is its
        # business too.
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        # ImportError: an optional part is missing, and the error names the extra that brings it.
        except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
            if ctx.params["debug"]:
                raise
            raise click.ClickException(_sentence(error)) from None


def _module(command: str) -> str:
    return f"{__name__}.{command.replace('-', '_')}"


def _help_line(command: str) -> str:
    spec = importlib.util.find_spec(_module(command))
    assert spec is not None
    assert spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _sentence(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:  # its own text starts with a number
        text = error.strerror + (f": '{error.filename}'" if error.filename else "")
    return " ".join(text.split())


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="testtime", prog_name="testtime", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Adapt trained models to data that has shifted, while they are used."""
    # torch says so wherever NumPy is not installed; nothing on the command line needs it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
