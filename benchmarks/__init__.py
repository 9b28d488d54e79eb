"""Measurements, each beside its peer in one run."""

import ctypes
import os
import sys

# A thread that waits must not spin: its seconds would be counted for whoever it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# glibc hands freed memory back to the system or not by what lies beside it, and who faults it in
# again pays: by chance up to 15 % of a step, on either side. TESTTIME_TRIM=1 leaves that in.
if sys.platform == "linux" and not os.environ.get("TESTTIME_TRIM"):
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)

import tests.conftest  # noqa: F401 - lets timm load beside a CPU build of torch
