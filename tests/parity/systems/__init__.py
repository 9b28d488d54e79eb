"""The systems, one file each, found by the name that recordings give them.

A file defines ``KINDS``: from the kind of a recording to a function that replays one of that kind
and returns the comparison. Dashes of a name are underscores in the file's name.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

from tests.parity.errors import Comparison
from tests.parity.recording import Recording, Unreplayable

Replay = Callable[[Recording], Comparison]


def find(recording: Recording) -> Replay:
    """Return what replays a recording.

    Raises:
        Unreplayable: its system, or its kind of that system, is not implemented yet.
    """
    name = recording.system.replace("-", "_")
    known = {file.stem for file in Path(__file__).parent.glob("[a-z]*.py")}
    if name not in known:
        raise Unreplayable(
            f"its system '{recording.system}' is not implemented yet "
            f"(those that are: {', '.join(sorted(known))})"
        )
    kinds: dict[str, Replay] = importlib.import_module(f"{__name__}.{name}").KINDS
    if recording.kind not in kinds:
        raise Unreplayable(
            f"its kind '{recording.kind}' is not implemented yet for '{recording.system}' "
            f"(those that are: {', '.join(kinds)})"
        )
    return kinds[recording.kind]
