"""Training: joint with a second task, and the outer loops of the published recipes."""
