"""Replays recordings of the authors' code against this library: ``python -m tests.parity FILE``."""
