"""Adapt a trained model to shifted data, without labels, while it is used."""
