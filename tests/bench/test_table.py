"""The README shows the committed rows, and nothing else."""

from pathlib import Path

from benchmarks.table import markdown

ROOT = Path(__file__).parent.parent.parent


def test_the_readmes_table_is_made_from_the_rows():
    table = markdown(ROOT / "benchmarks" / "results" / "cifar10.jsonl")
    assert table in (ROOT / "README.md").read_text()
