"""Measurements: each module has a `main()` that prints one table. `make bench` runs them all."""
