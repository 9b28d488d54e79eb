"""Models that go on learning while they are used."""
