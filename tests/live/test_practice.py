"""A practised freeze leaves nothing to be done for the first time while a process stands still."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.live.programs import running
from tests.needs import require_root


@pytest.mark.parametrize("program", [("memory_random", "4", "2"), ("threads",), ("sleeps",)])
def test_nothing_is_compiled_or_imported_while_a_process_stands_still(
    program: tuple[str, ...], tmp_path: Path
) -> None:
    require_root()
    with running(*program, directory=tmp_path) as it:
        argv = [sys.executable, "-m", "tests.live.practised", str(it.pid)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
        it.stop_and_verify()
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
