"""Error of networks under all 19 corruptions at five severities, beside what was published.

testtime bench --model resnet20:FILE --model resnet26gn:FILE --data cifar10:test.parquet \\
    --methods source --shifts all --batch-size 500 --out LEDGER
python -m benchmarks.cifar_corruptions LEDGER

The images are cut to 8 bits as those of CIFAR-10-C are; the draws are not the published ones, which
no seed can bring back.
"""

import sys
from typing import Any

from testtime.bench import Ledger
from testtime.shifts import CORRUPTIONS
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


def table(rows: list[dict[str, Any]], model: str) -> str:
    """Return errors in percent: a line for each corruption, a column for each severity."""
    rows = [row for row in rows if row["spec"]["model"] == model]
    errors = {s: 100 * part["error"] for row in rows for s, part in row["shifts"].items()}
    made = {s: record for row in rows for s, record in row["made"].items()}
    count = {row["results"]["images"] for row in rows}
    lines = [
        f"{model}, {' and '.join(map(str, sorted(count)))} images, clean: "
        + (f"{errors['clean']:.2f} %" if "clean" in errors else "not run"),
        "",
        "| error in % | " + " | ".join(map(str, SEVERITIES)) + " | mean | TTT's baseline at 5 |",
        "| --- |" + " ---: |" * 7,
    ]
    found = [n for n in CORRUPTIONS if all(f"{n}:{s}" in errors for s in SEVERITIES)]
    means: dict[str, list[float]] = {}
    for name in found:
        line = [errors[f"{name}:{s}"] for s in SEVERITIES]
        means[name] = [*line, sum(line) / 5]
        other = f"{TTT_BASELINE[name]:.1f}" if name in TTT_BASELINE else ""
        textures = made[f"{name}:5"][0].get("textures")
        label = name.replace("_", " ") + (f" ({textures})" if textures else "")
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
    rows = [row for row in Ledger.read(sys.argv[1]) if row["spec"]["method"] == "source"]
    for model in dict.fromkeys(row["spec"]["model"] for row in rows):
        print(f"\n{table(rows, model)}")
    print(f"\n{PUBLISHED}")


if __name__ == "__main__":
    main()
