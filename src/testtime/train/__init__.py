"""Training: the outer loops of the published recipes."""
