"""The parsers in C, under sanitizers: frames that are nearly right, and noise (tests/sanitize/link.sh)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.needs import require

SCRIPT = Path(__file__).parents[1] / "sanitize/link.sh"


@pytest.mark.long
def test_whatever_comes() -> None:
    require("gcc")
    done = subprocess.run(["sh", SCRIPT], capture_output=True, text=True, timeout=110)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
