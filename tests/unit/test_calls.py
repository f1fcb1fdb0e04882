"""Calls of MADV_REMOVE that a pager remembers."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).parent
LAZYPROC = HERE.parents[1] / "lazyproc"


def test_a_call_is_remembered_for_its_memory_and_its_process(tmp_path: Path) -> None:
    program = tmp_path / "calls"
    flags = ["-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{LAZYPROC}/uffd", f"-I{LAZYPROC}/wire"]
    sources = [HERE / "calls.c", *sorted((LAZYPROC / "uffd").glob("_*.c"))]
    subprocess.run(["gcc", *flags, "-pthread", "-o", program, *sources, "-ldl"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
