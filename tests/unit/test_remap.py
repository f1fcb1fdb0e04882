"""The tables of a pager when moves of memory are heard in any order."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).parent
LAZYPROC = HERE.parents[1] / "lazyproc"
PARTS = ("ledger", "states", "events", "remap", "shadow")


def test_memory_is_where_the_last_move_has_brought_it(tmp_path: Path) -> None:
    program = tmp_path / "remap"
    flags = ["-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{LAZYPROC}/uffd", f"-I{LAZYPROC}/wire"]
    sources = [HERE / "remap.c", *(LAZYPROC / f"uffd/_{part}.c" for part in PARTS)]
    subprocess.run(["gcc", *flags, "-o", program, *sources], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
