"""Operators, each with a readable reference and faster forms that equal it."""
