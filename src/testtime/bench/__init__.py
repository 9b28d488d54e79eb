"""What each method does for a model and its data: one row of measured numbers a combination."""

from testtime.bench.data import load_data
from testtime.bench.ledger import Ledger
from testtime.bench.row import Model, measure
from testtime.bench.run import run
from testtime.bench.spec import Spec, grid, parse_method

__all__ = ["Ledger", "Model", "Spec", "grid", "load_data", "measure", "parse_method", "run"]
