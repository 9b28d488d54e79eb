"""Shifted data: corruptions of images."""

from testtime.shifts.corruptions import CORRUPTIONS, Corruption, corrupt

__all__ = ["CORRUPTIONS", "Corruption", "corrupt"]
