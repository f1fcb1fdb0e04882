"""docs/traps.md promises tests: each of them must exist under the name it is given there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "traps.md").read_text()


def test_every_trap_has_a_row() -> None:
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", TABLE, re.M)] == list(range(1, 42))


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`((?:faults/)?test_\w+\.py)::(\w+)`", TABLE)
    assert len(named) > 41
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not re.search(rf"^def {test}\(", _file(file).read_text(), re.M)
    ]
    assert missing == []


def _file(name: str) -> Path:
    """In tests/live unless it says otherwise."""
    return ROOT / "tests" / (name if "/" in name else f"live/{name}")
