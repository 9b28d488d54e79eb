# Needs Python 3.11 or newer with venv and pip, and make. Everything is installed into .venv here.
#
#   make demo    set up and run the demonstration
#   make test    set up and run the tests
#   make lint    ruff and mypy
#   make wheel   build the wheel and try it in an empty environment
#   make bench   the measurements of benchmarks/, on a quiet machine
#
# TORCH_INDEX=URL takes torch from that package index (the CPU builds, say, which are far smaller).

PYTHON ?= python3
TORCH_INDEX ?=

PIN = -m pip install --disable-pip-version-check --constraint constraints.txt
# Without its dependencies: an index of torch builds need not hold the pinned versions of those.
TORCH = $(if $(TORCH_INDEX),$(PIN) --no-deps --index-url $(TORCH_INDEX) torch,-c '')

.PHONY: demo test lint wheel bench

demo: .venv/.core
	.venv/bin/testtime demo

test: .venv/.dev
	.venv/bin/python -m pytest

bench: .venv/.dev
	.venv/bin/python -m benchmarks.cost
	.venv/bin/python -m benchmarks.many

lint: .venv/.dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

# `build` goes first and last: setuptools would pack files that were deleted since the last build.
wheel: .venv/.core
	rm -rf build dist
	.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	rm -rf build
	@set -e; bare=$$(mktemp -d); trap 'rm -rf "$$bare"' EXIT; \
	echo "Installing $$(ls dist/*.whl), without extras, into an empty environment."; \
	.venv/bin/python -m venv "$$bare/venv"; \
	"$$bare/venv/bin/python" $(TORCH); \
	"$$bare/venv/bin/python" $(PIN) --quiet dist/*.whl; \
	.venv/bin/python -m tests.readme "$$bare/venv/bin/python"; \
	cd "$$bare"; venv/bin/testtime --version; venv/bin/testtime --help >/dev/null; venv/bin/testtime demo

# The stamps are touched last, so that a failed install is tried again.
.venv/.core: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "No '$(PYTHON)' was found; \
	name a Python 3.11 or newer, for example: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "testtime needs Python \
	3.11 or newer, and $(PYTHON) is %d.%d; name a newer one, for example: make PYTHON=python3.11 \
	$(MAKECMDGOALS)" % sys.version_info[:2])'
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	.venv/bin/python $(TORCH)
	.venv/bin/python $(PIN) --editable .
	@touch $@

.venv/.dev: .venv/.core
	.venv/bin/python $(PIN) --editable '.[dev]'
	@touch $@
