"""Rows on disk: JSON lines, a row a line, whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def check_writable(path: Path) -> None:
    """Refuse a place that rows cannot be appended to, before any time is spent on them.

    Raises:
        OSError: the folder is not there or may not be written to, or the path is no regular file.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        with path.open("ab"):
            pass
    except OSError as error:
        raise OSError(
            f"No rows can be written to {path} ({error.strerror or error}). Name another file "
            "with --out."
        ) from error


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a file of JSON lines.

    Raises:
        OSError: it could not be written (a full disk, say); the file is as it was before.
    """
    line = (json.dumps(row) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end and (file.seek(end - 1), file.read(1))[1] != b"\n":
            line = b"\n" + line  # the last line was torn: it stays alone
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
