"""Shifted data: corruptions of images."""

from testtime.shifts.corruptions import corrupt

__all__ = ["corrupt"]
