"""Hold the corruptions to recordings of the published code; a line a corruption and severity.

A recording is a JSON file of figures, which needs the images that it was made on, or an .npz of
exact outputs, whose windows of 224 pixels need them too.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.corruptions.figures import figures
from tests.corruptions.images import FORMS, read_images
from tests.corruptions.replay import recorded_draws
from testtime.shifts.corruptions import CONSTANTS, Corruption, Table, apply
from testtime.shifts.corruptions.filters import cut
from testtime.shifts.corruptions.jpeg import jpeg_compression
from testtime.shifts.corruptions.textures import MADE, find_textures

WITHIN, OUTSIDE, UNKNOWN = 0, 1, 2

EXIT_CODES = """\
exit code: 0 all lines are within; 1 one is outside, or failed on the way; 2 one was not judged (the
images are other ones, frost without the authors' textures, an unknown corruption), or bad usage.
"""

WINDOWS = {"mid": slice(88, 136), "tl": slice(0, 24), "br": slice(200, 224)}

# How far a pixel of the result looks, for what looks so far only. Where the images are not at hand,
# a window of them is enough for what lies that far inside.
MARGINS = {
    "gaussian_noise": 0,
    "impulse_noise": 0,
    "speckle_noise": 0,
    "brightness": 0,
    "saturate": 0,
    "frost": 0,
    "snow": 0,
    "spatter": 0,
    "release_save": 10,
    "jpeg_compression": 10,
    "pixelate": 4,
    "defocus_blur": 10,
    "gaussian_blur": 12,
    "glass_blur": 14,
    "elastic_transform": 12,
}

# The share of values that may be off by more than one level.
SHARE = {"elastic_transform": 0.995, "jpeg_compression": 0.94, "release_save": 0.94}


def judge_figures(goldens: dict[str, Any], images: Tensor) -> Iterator[tuple[str, int, str]]:
    """Yield a label, an exit code and what to print for every corruption and severity."""
    found = hashlib.sha256(images.permute(0, 2, 3, 1).contiguous().numpy()).hexdigest()
    if found != goldens["images_sha256"]:
        yield "images", UNKNOWN, f"not judged: recorded on other images ({goldens['images']})"
        return
    table: Table = "cifar" if goldens["size"] < 128 else "imagenet"
    for name, recorded in goldens["corruptions"].items():
        for severity, expected in recorded["severities"].items():
            label = f"{name} {severity}"
            if name not in CONSTANTS:
                yield label, UNKNOWN, "not judged: there is no such corruption"
            elif name == "frost" and find_textures() == MADE:
                yield label, UNKNOWN, "not judged: frost needs the files of imgcorr"
            else:
                corruption = Corruption(name, int(severity), table)
                yield label, *compare(corruption, recorded["runs"], images, goldens, expected)


def compare(
    corruption: Corruption,
    runs: int,
    images: Tensor,
    goldens: dict[str, Any],
    expected: dict[str, list[float]],
) -> tuple[int, str]:
    """Return the exit code of one corruption at one severity, and what to print about it."""
    clean = images / 255
    totals = dict.fromkeys(goldens["figures"], 0.0)
    for seed in range(runs):
        levels = cut(corruption(clean, torch.Generator().manual_seed(seed)))
        for name, value in figures(levels, images).items():
            totals[name] += value / runs
    shares = {
        name: abs(totals[name] - value) / tolerance
        for name, value, tolerance in zip(
            goldens["figures"], expected["value"], expected["tol"], strict=True
        )
    }
    worst = max(shares, key=shares.__getitem__)
    outside = sum(share > 1 for share in shares.values())
    if outside:
        return (
            OUTSIDE,
            f"OUTSIDE: {outside} figures, {worst} at {shares[worst]:.2f} of its tolerance",
        )
    return WITHIN, f"within: {worst} at {shares[worst]:.2f} of its tolerance"


def judge_exact(
    goldens: dict[str, np.ndarray], images: Tensor | None
) -> Iterator[tuple[str, int, str]]:
    """Yield a label, an exit code and what to print for every recorded output."""
    for key, recorded in goldens.items():
        form = re.fullmatch(r"(?!clean|part|frost_)(\w+?)_(\d+)(?:_(\d))?(?:_(mid|tl|br))?", key)
        if form is None:
            form = re.fullmatch(r"(frost)_(\d+)_(\d)(?:_(mid|tl|br))?", key)
        if form is None:
            continue
        name, side, severity, window = form.groups()
        if name not in CONSTANTS and name != "release_save":
            yield key, UNKNOWN, "not judged: there is no such corruption"
            continue
        clean, margin = _whole_images(goldens, images, side), 0
        if clean is None and window == "mid" and severity in (None, "3") and name in MARGINS:
            clean, margin = _canvas(goldens[f"clean_{side}_mid"], int(side)), MARGINS[name]
        if clean is None:
            yield key, UNKNOWN, "not judged: it needs the images that it was recorded on"
            continue
        if severity is None:
            result = jpeg_compression(clean / 255, 85)
        else:
            result = replay(goldens, clean, name, side, int(severity))
        if window is not None:
            result = result[..., WINDOWS[window], WINDOWS[window]]
        inner = slice(margin, result.shape[-1] - margin)
        yield key, *agreement(name, result[..., inner, inner], recorded[:, inner, inner])


def _canvas(window: np.ndarray, side: int) -> Tensor:
    """Return images that are black but for their middle window."""
    images = torch.zeros(len(window), 3, side, side, dtype=torch.uint8)
    images[..., WINDOWS["mid"], WINDOWS["mid"]] = torch.from_numpy(window).permute(0, 3, 1, 2)
    return images


def replay(
    goldens: dict[str, np.ndarray], clean: Tensor, name: str, side: str, severity: int
) -> Tensor:
    """Return images in levels, corrupted with the recorded draws."""
    constants = CONSTANTS[name]["cifar" if side == "32" else "imagenet"][severity - 1]
    texture = None
    if name == "frost":
        window = goldens[f"frost_texture_{side}"]
        texture = torch.from_numpy(window).permute(2, 0, 1)
        if len(window) < int(side):
            (texture,) = _canvas(window[None], int(side))
    x = clean / 255
    draws = recorded_draws(name, constants, x, int(goldens["seed"]), texture)
    return apply(name, x, constants, draws)


def agreement(name: str, result: Tensor, recorded: np.ndarray) -> tuple[int, str]:
    """Return the exit code of one output, and what to print about it."""
    off = (cut(result) - torch.from_numpy(recorded).permute(0, 3, 1, 2)).abs()
    near, equal = float((off <= 1).double().mean()), float((off == 0).double().mean())
    said = f"{equal:.2%} equal, {near:.2%} within a level, at most {int(off.max())} off"
    if near < SHARE.get(name, 0.998):
        return OUTSIDE, f"OUTSIDE: {said}"
    return WITHIN, f"within: {said}"


def _whole_images(
    goldens: dict[str, np.ndarray], images: Tensor | None, side: str
) -> Tensor | None:
    """Return the clean images, found among those given by the windows that were recorded."""
    if f"clean_{side}" in goldens:
        return torch.from_numpy(goldens[f"clean_{side}"]).permute(0, 3, 1, 2)
    if images is None:
        return None
    windows = {
        window: torch.from_numpy(goldens[f"clean_{side}_{window}"]).permute(0, 3, 1, 2)
        for window in WINDOWS
    }
    chosen = []
    for i in range(len(windows["mid"])):
        matching = [
            image
            for image in images
            if all(torch.equal(image[:, w, w], windows[k][i]) for k, w in WINDOWS.items())
        ]
        if not matching:
            return None
        chosen.append(matching[0])
    return torch.stack(chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge every recorded corruption and severity, and return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m tests.corruptions",
        description=__doc__,
        epilog=FORMS + "\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--goldens", required=True, type=Path, help="a recording, .json or .npz")
    parser.add_argument("--images", help="the images that it was made on; see below")
    options = parser.parse_args(arguments)
    try:
        if options.goldens.suffix == ".npz":
            with np.load(options.goldens) as file:
                exact = dict(file)
            images = read_images(options.images) if options.images else None
            lines = judge_exact(exact, images)
        else:
            goldens = json.loads(options.goldens.read_text())
            if options.images is None:
                parser.error("figures need --images")
            lines = judge_figures(goldens, read_images(options.images, goldens["n_images"]))
    except (OSError, ValueError, KeyError) as error:
        print(f"not judged: {error}")
        return UNKNOWN
    codes = set()
    for label, code, said in lines:
        print(f"{label:28} {said}", flush=True)
        codes.add(code)
    return next((code for code in (OUTSIDE, UNKNOWN, WITHIN) if code in codes), UNKNOWN)


if __name__ == "__main__":
    sys.exit(main())
