"""What each method does for a model and its data: one row of measured numbers a combination."""

from testtime.bench.data import Data, load_data
from testtime.bench.run import Row, run

__all__ = ["Data", "Row", "load_data", "run"]
