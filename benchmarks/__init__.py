"""Measurements, each beside its peer in one run."""

import os

# A thread that waits must not spin: its seconds would be counted for whoever it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tests.conftest  # noqa: F401 - lets timm load beside a CPU build of torch
