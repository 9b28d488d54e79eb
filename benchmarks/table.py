"""The README's table, from a ledger: methods by models, mean over corruptions and clean.

python -m benchmarks.table benchmarks/results/cifar10.jsonl
"""

import sys
from pathlib import Path

from testtime.bench import Ledger
from testtime.bench.summary import compare


def markdown(path: Path) -> str:
    """Return errors in percent: a line for each method, a column for each model."""
    ledger = Ledger.read(path)
    clean = {
        (row["model"]["name"], row["spec"]["method"]): row["results"]["error"]
        for row in ledger
        if row["spec"]["shifts"] == ["clean"] and row["status"] == "done"
    }
    found = compare(row for row in ledger if row["spec"]["shifts"] != ["clean"])
    models = {c.setting.model: {line.method: line for line in c.lines} for c in found}
    lines = [
        f"| method | {' | '.join(models)} |",
        "| --- |" + " ---: |" * len(models),
    ]
    for method in dict.fromkeys(row["spec"]["method"] for row in ledger):
        cells = []
        for model, by_method in models.items():
            line = by_method[method]
            if not line.rows:
                cells.append("does not fit")
                continue
            best = min(other.error for other in by_method.values() if other.rows)
            shown = f"{100 * line.error:.2f}"
            shown = f"**{shown}**" if line.error == best else shown
            note = " †" if line.collapsed else ""
            cells.append(f"{shown}{note} ({100 * clean[model, method]:.2f})")
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])))
