"""Rows on disk: JSON lines, a row a line, whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a file of JSON lines.

    Raises:
        OSError: it could not be written (a full disk, say); the file is as it was before.
    """
    line = (json.dumps(row) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            written = file.write(line)
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(end)
            raise OSError(f"{_failed(path)} ({error.strerror})") from error
        if written != len(line):
            file.truncate(end)
            raise OSError(_failed(path))


def _failed(path: Path) -> str:
    return (
        f"The row could not be written to {path}: the disk is full, or the file is too large. "
        "What was there before is unchanged; free some space or name another file with --out."
    )
