"""The pager's requests on their way out."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).parent
LAZYPROC = HERE.parents[1] / "lazyproc"


def test_every_request_arrives_once_and_in_order(tmp_path: Path) -> None:
    program = tmp_path / "link_ring"
    flags = ["-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{LAZYPROC}/uffd", f"-I{LAZYPROC}/wire"]
    sources = [HERE / "link_ring.c", LAZYPROC / "uffd/_link.c"]
    subprocess.run(["gcc", *flags, "-o", program, *sources, "-Wl,--wrap=send", "-ldl"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
