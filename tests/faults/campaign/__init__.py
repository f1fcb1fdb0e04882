"""Kills and cuts at moments that a seed draws, each in a migration of its own between two fresh hosts."""
