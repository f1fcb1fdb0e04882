"""The command line: one file a command with `add` (its options) and `run` (its work, imported there)."""
