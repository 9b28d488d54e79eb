"""Layers whose hidden state is a model that is trained as they read."""
