"""Replay recordings and print how far the library is from each, a line a file."""

import argparse
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tests.parity.errors import Comparison
from tests.parity.recording import Unreplayable, read
from tests.parity.systems import find

WITHIN, ABOVE, UNKNOWN = 0, 1, 2

EXIT_CODES = """\
exit code: 0 all files are within the bar; 1 a file is above it, or failed on the way; 2 a file was
not judged (its system is not implemented yet, it cannot be read, or it holds something unknown), or
bad usage. Of several files, one above the bar gives 1 whatever the others give: a wrong number
counts for more than a missing one.
"""


def judge(path: str) -> tuple[int, str]:
    """Return the exit code of one file, and what to print about it."""
    try:
        recording = read(path)
        replay = find(recording)
        with _default_dtype(recording.dtype):
            comparison = replay(recording)
    except Unreplayable as error:
        return UNKNOWN, f"not replayed: {error}"
    except Exception as error:
        traceback.print_exc(limit=-3)
        return ABOVE, f"failed: {type(error).__name__}: {error}"
    if not comparison.worst:
        return UNKNOWN, "not replayed: it holds nothing to compare"
    if not comparison.within():
        return ABOVE, f"ABOVE {comparison.bar:g}: {_spell(comparison)}"
    if left := recording.unread():
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        return UNKNOWN, f"not replayed: nothing here knows its {', '.join(left[:4])}{more}"
    # What matters of these shows in the numbers: they are named, but decide nothing.
    unused = ", ".join(sorted(recording.config.unread))
    note = f"  (config not used: {unused})" if unused else ""
    return WITHIN, f"within {comparison.bar:g}: {_spell(comparison)}{note}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge every file and return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m tests.parity",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a recording, .safetensors")
    files = parser.parse_args(arguments).files
    torch.set_num_threads(1)  # the networks are tiny
    width, codes = max(map(len, files)), set()
    for file in files:
        code, text = judge(file)
        print(f"{file:{width}}  {text}", flush=True)
        codes.add(code)
    return next(code for code in (ABOVE, UNKNOWN, WITHIN) if code in codes)


def _spell(comparison: Comparison) -> str:
    """Return the largest error of each kind, and of those above the bar the tensor that has it."""
    found = []
    for group, (error, name) in comparison.worst.items():
        where = "" if error <= comparison.bar else f" ({name})"
        found.append(f"{group} {error:.1e}{where}")
    return "  ".join(found)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    sys.exit(main())
