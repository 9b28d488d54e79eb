"""Operators that learn as they read: pure functions of tensors, which need torch alone."""
