"""Memory that has moved, of which the pager has not heard yet."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAZYPROC = HERE.parents[1] / "lazyproc"


@pytest.fixture(scope="module")
def unheard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("unheard") / "unheard"
    flags = ["-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{LAZYPROC}/uffd", f"-I{LAZYPROC}/wire"]
    sources = [HERE / "unheard.c", *sorted((LAZYPROC / "uffd").glob("_*.c"))]
    subprocess.run(["gcc", *flags, "-pthread", "-o", program, *sources, "-ldl"], check=True)
    return program


@pytest.mark.parametrize("what", ["limbo", "release"])
def test_what_is_done_meanwhile_waits_for_it(unheard: Path, what: str) -> None:
    done = subprocess.run([unheard, what], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
