"""The corruptions held to recordings of the published code."""
