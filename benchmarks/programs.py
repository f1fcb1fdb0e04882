"""The programs that the benchmarks move or start, made once a run, in a folder that every host sees too."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent


@cache
def program(name: str) -> Path:
    """The executable of benchmarks/NAME.c."""
    binary = Path(_folder().name) / name
    flags = ("-O2", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", *flags, "-o", binary, HERE / f"{name}.c", "-lpthread"], check=True)
    return binary


@cache
def script(name: str) -> Path:
    """benchmarks/NAME.py as a program of its own, under this Python."""
    binary = Path(_folder().name) / name
    binary.write_text(f"#!{sys.executable}\n{(HERE / f'{name}.py').read_text()}")
    binary.chmod(0o755)
    return binary


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lazyproc-bench-", dir="/var/tmp")
