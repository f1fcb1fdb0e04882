"""What tests fetch from Debian with apt and keep: a folder is filled once, by whichever test session comes first.

The machine's own apt configuration says from where. Nothing is installed.
"""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.needs import lacking

_COMPLETE = ".complete"


def filled(base: Path, fill: Callable[[Path], None], what: str, remedy: str) -> Path:
    """`base` after `fill(base)`; ends the test when that cannot be done: `what` is missing, `remedy` mends it."""
    try:
        base.mkdir(parents=True, exist_ok=True)
        with open(base / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two test sessions may start at once
            if not (base / _COMPLETE).exists():
                fill(base)
                (base / _COMPLETE).touch()
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        lacking(f"{what} ({detail.strip().splitlines()[-1]})", f"{remedy}, then: rm -r {base}")
    return base


def run(*command: str, cwd: Path | None = None) -> str:
    """What a command prints. Raises CalledProcessError, which has what it complained of."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, cwd=cwd).stdout
