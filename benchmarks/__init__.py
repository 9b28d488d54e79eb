"""Measurements, each beside its peer in one run."""

import tests.conftest  # noqa: F401 - lets timm load beside a CPU build of torch
