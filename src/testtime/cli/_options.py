"""Kinds of options that commands share."""

from typing import Any

import click


class _Commas(click.ParamType[list[Any]]):
    """A list with commas between, of words or of whole numbers."""

    def __init__(self, of: type, name: str) -> None:
        self._of, self.name = of, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, list):
            return value
        parts = [part.strip() for part in value.split(",")]
        try:
            return [self._of(part) for part in parts if part]
        except ValueError:
            self.fail(f"'{value}' is no list of whole numbers, such as 64,1.", param, ctx)


COMMAS = _Commas(str, "a,b,...")
NUMBERS = _Commas(int, "n,m,...")
