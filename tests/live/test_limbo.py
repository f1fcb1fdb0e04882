"""Memory of which the tables know that it has moved, and not yet where to."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).parent
LAZYPROC = HERE.parents[1] / "lazyproc"


def test_pages_wait_until_it_is_told_where_their_memory_is(tmp_path: Path) -> None:
    program = tmp_path / "limbo"
    flags = ["-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{LAZYPROC}/uffd", f"-I{LAZYPROC}/wire"]
    sources = [HERE / "limbo.c", *sorted((LAZYPROC / "uffd").glob("_*.c"))]
    subprocess.run(["gcc", *flags, "-pthread", "-o", program, *sources, "-ldl"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
