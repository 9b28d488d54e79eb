"""Training: networks that go on learning at test time need a second task from the start."""
