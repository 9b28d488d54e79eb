"""The ledger: rows of results as JSON lines, a row a line, whole or not at all.

A row is sealed: ``sha256`` is the hash of everything else in it, so that an edit by hand shows. Its
``key`` is the hash of what was asked for (``spec``, with the hashes of model and data), so that a
rerun knows what is there. What differs between two runs of one row lies under ``measured``.
"""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

FORMAT = 1
Row = dict[str, Any]


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def seal(row: Row) -> Row:
    """Return the row with its format, and the hash of all of it."""
    row = {"format": FORMAT, **{k: v for k, v in row.items() if k != "sha256"}}
    return {**row, "sha256": digest(row)}


def flat(row: Row) -> dict[str, Any]:
    """Return a row's values by dotted path, ``results.error``; lists as JSON."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= {f"{key}.{path}": inner for path, inner in flat(value).items()}
        else:
            found[key] = json.dumps(value) if isinstance(value, list) else value
    return found


@dataclass
class Ledger:
    """Rows in order, in memory or in a file.

    >>> ledger = Ledger.read("results.jsonl")  # doctest: +SKIP
    >>> errors = [row["results"]["error"] for row in ledger]  # doctest: +SKIP

    Args:
        rows: as JSON values.
        path: where they lie and :meth:`append` writes; none: in memory alone.
    """

    rows: list[Row] = field(default_factory=list)
    path: Path | None = None

    @classmethod
    def read(cls, path: str | PathLike[str], repair: bool = False) -> "Ledger":
        """Read a file; a last line that is cut off is left out, and said.

        Args:
            path: of JSON lines.
            repair: take a last line that is cut off out of the file too.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a line is no row, of another version, or was edited; it is named.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no ledger {path}. testtime bench --out writes one.")
        data = path.read_bytes()
        whole, torn = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
        if torn:
            warnings.warn(
                f"The last line of {path} was cut off and is left out: {torn[:40]!r}... "
                f"{'It was taken out of the file.' if repair else ''}".rstrip(),
                UserWarning,
                stacklevel=2,
            )
            if repair:
                os.truncate(path, len(whole))
        lines = enumerate(whole.decode(errors="replace").splitlines(), 1)
        return cls([_parse(line, f"{path}, line {number}") for number, line in lines], path)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self) -> set[str]:
        """Return the keys of the rows that are done; failed ones are run again."""
        return {row["key"] for row in self.rows if row["status"] == "done"}

    def filter(self, keep: Callable[[Row], bool]) -> "Ledger":
        """Return the rows for which ``keep`` holds, in memory."""
        return Ledger([row for row in self.rows if keep(row)])

    def merge(self, *others: "Ledger") -> "Ledger":
        """Return all rows in memory, of equal ones the first; a failed row gives way to a done one.

        Raises:
            ValueError: two rows were asked for alike, yet came out differently.
        """
        merged: dict[str, Row] = {}
        for row in (row for ledger in (self, *others) for row in ledger):
            held = merged.get(row["key"])
            if held is None or held["status"] == "failed":
                merged[row["key"]] = row
            elif row["status"] == "done" and outcome(held) != outcome(row):
                raise ValueError(
                    f"Two rows were asked for alike but came out differently: {title(row)} "
                    f"({held['results']['error']:.4f} and {row['results']['error']:.4f}). They "
                    "were made by other code, on another device or with other versions; filter "
                    "one of them out."
                )
        return Ledger(list(merged.values()))

    def check(self) -> list[str]:
        """Return what makes rows doubtful or hard to compare, in sentences; empty if nothing."""
        found = []
        seen: dict[str, int] = {}
        for number, row in enumerate(self.rows, 1):
            if row["key"] in seen and row["status"] == "done":
                found.append(f"Row {number} repeats row {seen[row['key']]}: {title(row)}.")
            seen.setdefault(row["key"], number)
            if row["status"] == "failed":
                found.append(f"Row {number} failed: {title(row)}: {row['error']}")
        codes = sorted({row["versions"]["code"] for row in self.rows})
        if len(codes) > 1:
            found.append(f"The rows were made with {len(codes)} states of the code: {codes}.")
        for kind in ("model", "data"):
            hashes: dict[str, set[str]] = {}
            for row in self.rows:
                hashes.setdefault(row[kind]["name"], set()).add(row[kind]["sha256"])
            found += [
                f"The {kind} '{name}' had {len(held)} different contents: {sorted(held)}."
                for name, held in hashes.items()
                if len(held) > 1
            ]
        return found

    def append(self, row: Row) -> None:
        """Seal a row and add it, in the file too; on an error both are as before.

        Raises:
            OSError: it could not be written, on a full disk say.
        """
        row = seal(row)
        if self.path is not None:
            _append(self.path, row)
        self.rows.append(row)

    def csv(self) -> str:
        """Return the rows as CSV, a column for each dotted path."""
        lines = [flat(row) for row in self.rows]
        columns = list(dict.fromkeys(column for line in lines for column in line))
        out = io.StringIO()
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(lines)
        return out.getvalue()

    def parquet(self, path: str | PathLike[str]) -> None:
        """Write the rows to a parquet file, a column for each dotted path.

        Raises:
            ImportError: that needs the extra ``data``.
        """
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ImportError(
                f"Writing parquet needs {error.name}: pip install 'testtime[data]'."
            ) from error
        pq.write_table(pa.Table.from_pylist([flat(row) for row in self.rows]), path)


@contextlib.contextmanager
def opened(path: str | PathLike[str]) -> Iterator[Ledger]:
    """Open a file for appending, alone; a cut-off last line is repaired, with a warning.

    Raises:
        OSError: it cannot be written to, or another process writes to it.
        ValueError: it holds something that is no row of this version.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        handle = path.open("ab")
    except OSError as error:
        raise OSError(
            f"No rows can be written to {path} ({error.strerror or error}). Name another file."
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                f"Another process is writing to {path}. Wait for it, or name another file and "
                "merge them afterwards: testtime ledger --merge."
            ) from error
        yield Ledger.read(path, repair=True)


def outcome(row: Row) -> Row:
    """Return what two runs of one row must agree in: all but what was measured on the clock."""
    return {k: v for k, v in row.items() if k not in ("measured", "sha256", "command")}


def title(row: Row) -> str:
    """Return which row it is, in words."""
    spec = row["spec"]
    return (
        f"{spec['method']} on {row['model']['name']}, {' '.join(spec['shifts'])}, "
        f"{spec['protocol']}, batches of {spec['batch_size']}, seed {spec['seed']}"
    )


def _parse(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
        version = row["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{place} is no row of a ledger: {line[:60]!r}. Remove the line, or restore the file."
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"{place} has format {version}, this version reads {FORMAT}. Use the version of "
            "testtime that wrote it, or make the rows again."
        )
    if seal(row) != row:
        raise ValueError(
            f"{place} was changed after it was written: its hash does not fit. Restore the line, "
            "or remove it and run the bench again."
        )
    return dict(row)


def _append(path: Path, row: Row) -> None:
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            written = file.write(line)
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(end)
            raise OSError(f"{_full(path)} ({error.strerror})") from error
        if written != len(line):
            file.truncate(end)
            raise OSError(_full(path))


def _full(path: Path) -> str:
    return (
        f"The row could not be written to {path}: the disk is full, or the file is too large. "
        "What was there before is unchanged; free some space or name another file."
    )


def write(rows: Iterable[Row], path: str | PathLike[str]) -> None:
    """Write rows to a new file, whole or not at all.

    Raises:
        FileExistsError: there is a file already.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is there already. Name a new file.")
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
