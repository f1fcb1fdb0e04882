"""Measurements: each scene is a function from a number of rounds to a Result. `make bench` runs them all."""
