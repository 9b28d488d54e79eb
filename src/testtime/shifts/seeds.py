"""Seeds out of seeds, the same in every process."""

import hashlib

import torch


def derive(*parts: object) -> int:
    """Return a seed of 63 bits that depends on all parts, which are numbers and strings."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator(seed: int) -> torch.Generator:
    """Return a generator on the CPU with that seed."""
    return torch.Generator().manual_seed(seed)
