"""Corrupted copies of a folder of images, with a manifest that says how each file was made."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

import testtime
from testtime.shifts.corruptions import IMAGENET_SIDE, Table, corrupt
from testtime.shifts.data import extra_data
from testtime.shifts.decode import Decode, image_files
from testtime.shifts.seeds import derive, generator
from testtime.shifts.shift import parse_corruptions

MANIFEST = "manifest.jsonl"

# How ImageNet-C was saved; other formats lose nothing.
_SAVE: dict[str, dict[str, Any]] = {
    ".jpg": {"format": "JPEG", "quality": 85, "optimize": True},
    ".jpeg": {"format": "JPEG", "quality": 85, "optimize": True},
    ".png": {"format": "PNG"},
    ".webp": {"format": "WEBP", "lossless": True},
    ".bmp": {"format": "BMP"},
    ".tif": {"format": "TIFF"},
    ".tiff": {"format": "TIFF"},
}


@dataclass
class Outcome:
    """What ``corrupt_folder`` did: files written and found made, and why images were left out."""

    written: int = 0
    kept: int = 0
    broken: dict[str, str] = field(default_factory=dict)


def corrupt_folder(
    source: str | Path,
    out: str | Path,
    shifts: Sequence[str],
    *,
    seed: int = 0,
    table: Table | None = None,
    decode: Decode | None = None,
    strict: bool = False,
    progress: Callable[[int], None] = lambda files: None,
) -> Outcome:
    """Write every image of a folder under every shift, to ``OUT/fog/5/PATH`` and so on.

    The folders are those of ImageNet-C. Levels are cut to 8 bits towards zero, JPEG is saved at
    quality 85 as there, other formats without loss. The draws of a file depend on the seed, its
    path below the source, corruption and severity. Files appear whole or not at all; a run that was
    broken off, or is given more shifts, goes on where it was.

    Args:
        source: the folder with the images, in folders of any depth.
        out: a new or empty folder, or that of the same run.
        shifts: corruptions with severities, such as ``fog:5``.
        seed: of all draws.
        table: whose constants to use, as in ``corrupt``.
        decode: size of the images before they are corrupted; as stored, if not given. ImageNet-C
            has ``Decode(resize=256, crop=224)``.
        strict: stop at the first image that cannot be read or corrupted, instead of leaving it out.
        progress: called with a number of files that are done.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        FileExistsError: the output folder holds something else, or a run with other settings.
        BlockingIOError: another process is writing there.
        ValueError: a shift is not known, the folders lie in one another, or an image is broken and
            ``strict`` is set, or all are.
        ImportError: it needs the extra ``data``.
    """
    source, out = Path(source).resolve(), Path(out).resolve()
    wanted = [(name, severity) for shift in shifts for name, severity in parse_corruptions(shift)]
    if not wanted or len(wanted) != len(shifts):
        raise ValueError("Give corruptions with a severity, one each, such as fog:5.")
    if source == out or source in out.parents:
        raise ValueError(f"{out} lies in {source}. Write the corrupted images somewhere else.")
    decode = decode or Decode()
    paths = [path.as_posix() for path in image_files(source)]
    outcome = Outcome()
    with _manifest(out, _settings(source, seed, table, decode)) as manifest:
        for path in paths:
            files = {f"{name}/{severity}/{path}": (name, severity) for name, severity in wanted}
            missing = {file: shift for file, shift in files.items() if not _is_made(out / file)}
            outcome.kept += len(files) - len(missing)
            progress(len(files) - len(missing))
            try:
                for line, data in _corrupted(source, path, missing, seed, table, decode):
                    _write(out, line, data, manifest)
                    outcome.written += 1
                    progress(1)
            except _BrokenError as error:
                if strict:
                    raise ValueError(f"{error} Mend or remove it, or do without strict.") from error
                outcome.broken[path] = str(error)
                progress(len(missing))
    if len(outcome.broken) == len(paths):
        first = next(iter(outcome.broken.values()))
        raise ValueError(f"None of the {len(paths)} images in {source} could be used. {first}")
    return outcome


class _BrokenError(ValueError):
    """An image that cannot be read or corrupted."""


def _corrupted(
    source: Path,
    path: str,
    files: dict[str, tuple[str, int]],
    seed: int,
    table: Table | None,
    decode: Decode,
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield a line of the manifest and the encoded image for each file."""
    if not files:
        return
    try:
        encoded = (source / path).read_bytes()
        image = decode(encoded, path)[None] / 255
    except (OSError, ValueError) as error:
        raise _BrokenError(str(error)) from error
    height, width = image.shape[-2:]
    for file, (name, severity) in files.items():
        own = derive(seed, path, name, severity)
        chosen = table or ("imagenet" if min(height, width) >= IMAGENET_SIDE else "cifar")
        try:
            changed = corrupt(image, name, severity, generator=generator(own), table=chosen)
        except ValueError as error:
            raise _BrokenError(f"{path} cannot be corrupted: {error}") from error
        data = _encode(changed[0], Path(path).suffix.lower())
        yield (
            {
                "file": file,
                "source": path,
                "source_sha256": hashlib.sha256(encoded).hexdigest(),
                "type": name,
                "severity": severity,
                "seed": own,
                "table": chosen,
                "height": height,
                "width": width,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            },
            data,
        )


def _encode(image: Tensor, suffix: str) -> bytes:
    from PIL import Image

    # A whole level must not fall to the one below for the rounding of float32.
    levels = (image * 255 + 1e-4).floor().to(torch.uint8).permute(1, 2, 0).contiguous()
    buffer = io.BytesIO()
    Image.fromarray(levels.numpy()).save(buffer, **_SAVE[suffix])
    return buffer.getvalue()


def _is_made(path: Path) -> bool:
    # An empty file is what a power failure may leave of one that was just made.
    return path.is_file() and path.stat().st_size > 0


def _write(out: Path, line: dict[str, Any], data: bytes, manifest: IO[bytes]) -> None:
    """Write the file aside, its line, and only then put the file in its place.

    So a file in its place has its line, and only the last line can lack its file.
    """
    path, part = out / line["file"], out / ".part"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(data)
        manifest.write(json.dumps(line).encode() + b"\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _settings(source: Path, seed: int, table: Table | None, decode: Decode) -> dict[str, Any]:
    """Return all that decides the bytes of a file, besides its path and its shift."""
    with extra_data("Corrupting images"):
        import numpy  # noqa: F401 - needed to encode
        import PIL
    return {
        "source": str(source),
        "seed": seed,
        "table": table or f"imagenet from {IMAGENET_SIDE} pixels on, else cifar",
        "decode": asdict(decode),
        "save": "levels cut to 8 bits; JPEG at quality 85, other formats without loss",
        "versions": {
            "testtime": testtime.__version__,
            "torch": torch.__version__,
            "pillow": PIL.__version__,
        },
    }


@contextmanager
def _manifest(out: Path, settings: dict[str, Any]) -> Iterator[IO[bytes]]:
    """Open the manifest to append to; refuse that of another run."""
    import fcntl

    path = out / MANIFEST
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file. Name a new folder.")
    if out.exists() and not path.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds files but no {MANIFEST}. Name a new or empty folder.")
    out.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"Another process is writing to {out}. Wait for it, or name another folder."
            ) from error
        file.seek(0)
        header = file.readline()
        if header.endswith(b"\n"):
            _check_same_run(path, header, settings)
            _drop_unfinished_line(out, file, len(header))
        else:  # new, or killed in the middle of its first line
            file.truncate(0)
            file.write(json.dumps({"run": settings}).encode() + b"\n")
        yield file


def _check_same_run(path: Path, header: bytes, settings: dict[str, Any]) -> None:
    try:
        run = json.loads(header)["run"]
        other = [key for key in settings if run.get(key) != settings[key]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileExistsError(
            f"{path} is damaged, or no manifest of this command. Name a new folder."
        ) from error
    if other:
        raise FileExistsError(
            f"{path.parent} holds another run: "
            + "; ".join(f"{key} {run.get(key)}, now {settings[key]}" for key in other)
            + ". Name a new folder."
        )


def _drop_unfinished_line(out: Path, file: IO[bytes], header: int) -> None:
    """Cut off the last line if it is torn, or its file was not put in its place."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(header, end - 2**16))
    *_, last, torn = [b"", *file.read().split(b"\n")]
    end -= len(torn)
    try:
        if last and not _is_made(out / json.loads(last)["file"]):
            end -= len(last) + 1
    except (ValueError, KeyError, TypeError) as error:
        raise FileExistsError(f"{out / MANIFEST} is damaged. Name a new folder.") from error
    file.truncate(end)
