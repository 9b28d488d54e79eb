"""Did you mean: the known name nearest to one that was mistyped."""

import difflib
from collections.abc import Iterable


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean '...'?`` for the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
