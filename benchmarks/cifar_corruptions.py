"""Error of networks on CIFAR-10 test images under all 19 corruptions at five severities.

python -m benchmarks.cifar_corruptions --model resnet20:FILE --model resnet26gn:FILE \
    --data cifar10:test.parquet [--device cuda] [--images 1000] [--out ROWS.jsonl]

The images are cut to 8 bits as those of CIFAR-10-C are; the draws are not the published ones, which
no seed can bring back. A row is appended for each model, corruption and severity, and rows that are
there already are not made again. Then the tables of all rows of the file are printed.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from testtime.bench import load_data, run
from testtime.bench.data import Data
from testtime.bench.ledger import append, check_writable
from testtime.models.load import load_model
from testtime.shifts import CORRUPTIONS, Corruption
from testtime.shifts.corruptions import STANDARD

SEVERITIES = (1, 2, 3, 4, 5)

# Published, not ours. TTT's baseline is another training of the same network.
TTT_BASELINE = dict(
    zip(
        STANDARD,
        (50.5, 47.2, 56.1, 23.7, 51.7, 24.3, 26.3, 25.6, 34.4, 28.1, 13.5, 25.0, 27.4, 55.8, 29.8),
        strict=True,
    )
)
PUBLISHED = """\
Published error of ResNet-26-GN without adaptation, on the released CIFAR-10-C:
- MEMO (Zhang, Levine and Finn 2022), this checkpoint's network: 22.5 % over the 15 corruptions and
  all levels (from memory of the paper's table, not read again).
- TTT (Sun et al. 2020), another training of this network, level 5: the last column, mean 34.6 %.
What differs here: the draws; libraries of 2018 in the released files; 20 test images whose pixels
are not exact; of a subset, the images."""


def corrupted(data: Data, corruption: Corruption, seed: int) -> Data:
    """Return the data with corrupted images; every corruption and severity begins at the seed."""
    generator = torch.Generator(data.images.device).manual_seed(seed)
    parts = [corruption(part, generator) for part in data.images.split(500)]
    return dataclasses.replace(data, images=torch.cat(parts))


def table(rows: list[dict[str, Any]], model: str) -> str:
    """Return errors in percent: a line for each corruption, a column for each severity."""
    errors = {
        (row["shift"], row["severity"]): 100 * row["error"] for row in rows if row["model"] == model
    }
    images = {row["images"] for row in rows if row["model"] == model}
    lines = [
        f"{model}, {' and '.join(map(str, sorted(images)))} images, clean: "
        + (f"{errors['clean', 0]:.2f} %" if ("clean", 0) in errors else "not run"),
        "",
        "| error in % | " + " | ".join(map(str, SEVERITIES)) + " | mean | TTT's baseline at 5 |",
        "| --- |" + " ---: |" * 7,
    ]
    found = [name for name in CORRUPTIONS if all((name, s) in errors for s in SEVERITIES)]
    means: dict[str, list[float]] = {}
    for name in found:
        line = [errors[name, s] for s in SEVERITIES]
        means[name] = [*line, sum(line) / 5]
        other = f"{TTT_BASELINE[name]:.1f}" if name in TTT_BASELINE else ""
        textures = {row["corruption"].get("textures") for row in rows if row["shift"] == name} - {
            None
        }
        label = name.replace("_", " ") + (f" ({', '.join(sorted(textures))})" if textures else "")
        cells = " | ".join(f"{value:.1f}" for value in means[name])
        lines.append(f"| {label} | {cells} | {other} |")
    for label, names in {"mean of the 15": STANDARD, "mean of the 19": CORRUPTIONS}.items():
        if set(names) <= set(found):
            columns = zip(*(means[name] for name in names), strict=True)
            cells = " | ".join(f"{sum(column) / len(names):.1f}" for column in columns)
            other = f"{sum(TTT_BASELINE.values()) / 15:.1f}" if len(names) == 15 else ""
            lines.append(f"| {label} | {cells} | {other} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", default=[], help="as for testtime bench")
    parser.add_argument("--data", required=True, help="as for testtime bench")
    parser.add_argument("--names", default=",".join(CORRUPTIONS))
    parser.add_argument("--images", type=int, help="only so many images, the first ones")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("cifar_corruptions.jsonl"))
    options = parser.parse_args()
    shifts = [Corruption(n, s, cut=True) for n in options.names.split(",") for s in SEVERITIES]
    check_writable(options.out)

    data = load_data(options.data)
    count = min(options.images or len(data.labels), len(data.labels))
    name = data.name if count == len(data.labels) else f"{data.name}, the first {count}"
    data = Data(
        name,
        data.images[:count].to(options.device),
        data.labels[:count].to(options.device),
        data.sha256,
    )
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    done = {
        (r["model"], r["data"], r["seed"], r["batch_size"], r["shift"], r["severity"]) for r in rows
    }
    models = {spec.partition(":")[0]: load_model(spec).to(options.device) for spec in options.model}
    call = shlex.join(["python", "-m", "benchmarks.cifar_corruptions", *sys.argv[1:]])
    for shift in [None, *shifts]:
        label = ("clean", 0) if shift is None else (shift.name, shift.severity)
        left = [
            model
            for model in models
            if (model, name, options.seed, options.batch_size, *label) not in done
        ]
        if not left:
            continue
        shifted = data if shift is None else corrupted(data, shift, options.seed)
        record = {} if shift is None else shift.record(*data.images.shape[2:])
        for model in left:
            (row,) = run(
                models[model],
                shifted,
                name=model,
                methods=["source"],
                shifts=["clean"],  # the images are corrupted already
                batch_size=options.batch_size,
                seed=options.seed,
            )
            row = dataclasses.replace(row, shift=label[0], severity=label[1], corruption=record)
            rows.append({**row.json(), "command": call})
            append(options.out, rows[-1])
            print(f"{model} {label[0]} {label[1]}: {100 * row.error:.2f} %", flush=True)
    for model in dict.fromkeys(row["model"] for row in rows):
        print(f"\n{table(rows, model)}")
    print(f"\n{PUBLISHED}")


if __name__ == "__main__":
    main()
