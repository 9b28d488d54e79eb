"""The table of a file of rows in Markdown, as the README shows it.

python -m benchmarks.table benchmarks/results/cifar10.jsonl
"""

import json
import sys
from pathlib import Path


def markdown(path: Path) -> str:
    """Return errors in percent: a line for each model and method, a column for each shift."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    shifts = list(dict.fromkeys(row["shift"] for row in rows))
    lines = [
        "| model | method | "
        + " | ".join(shift.replace("_", " ") for shift in shifts)
        + " | mean |",
        "| --- | --- |" + " ---: |" * (len(shifts) + 1),
    ]
    for model, method in dict.fromkeys((row["model"], row["method"]) for row in rows):
        found = {
            r["shift"]: r["error"] for r in rows if (r["model"], r["method"]) == (model, method)
        }
        errors = [100 * found[shift] for shift in shifts]
        cells = [f"{error:.2f}" for error in [*errors, sum(errors) / len(errors)]]
        lines.append(f"| {model} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])))
