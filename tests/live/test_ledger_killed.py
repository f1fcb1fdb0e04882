"""A pager that is killed at any instruction of a change of its tables leaves what the next one can put right."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
ROOM = HERE.parents[1] / "lazyproc"
SOURCES = (
    HERE / "ledger_killed.c",
    *(ROOM / f"uffd/_{part}.c" for part in ("ledger", "states", "events", "remap", "shadow")),
)
FEWEST = 20  # kills, or the change was over before it began


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("ledger") / "ledger_killed"
    flags = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{ROOM / 'uffd'}", f"-I{ROOM / 'wire'}")
    subprocess.run(["gcc", *flags, *map(str, SOURCES), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize(
    "change",
    [
        "unmap-middle",
        "unmap-all",
        "move",
        "double",
        "late-move",
        "late-unmap",
        "unmap-after-move",
        "discard",
        "remove",
        "fork",
        "fork-again",
        "child-unmap",
        "retire-child",
        "retire",
    ],
)
def test_killed_at_any_instruction_of_a_change(killed: Path, change: str) -> None:
    done = subprocess.run([str(killed), change], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) >= FEWEST
