"""What a real `lazyproc restore` has imported when its tree runs: the rooms that this tree needed, and no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.live.programs import running
from tests.unit.test_startup import UNWANTED

RESTORE = """
import sys
from lazyproc.cli.main import main
from lazyproc.restore.tree import BuiltTree

release = BuiltTree.release

def told(tree):
    release(tree)
    print(*sys.modules)

BuiltTree.release = told
sys.exit(main(["restore", "-D", sys.argv[1], "--lazy", "--detach", "--pidfile", sys.argv[2]]))
"""


def imported_by_restore(name: str, *arguments: object, directory: Path) -> set[str]:
    images, pidfile = directory / "images", directory / "pid"
    with running(name, *arguments, directory=directory) as program:
        command = [
            sys.executable,
            "-m",
            "lazyproc.cli.main",
            "checkpoint",
            str(program.pid),
            "-D",
            str(images),
        ]
        subprocess.run(command, check=True, capture_output=True)
        program.process.wait()
    try:
        command = [sys.executable, "-c", RESTORE, str(images), str(pidfile)]
        return set(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split())
    finally:
        if pidfile.exists():
            os.kill(int(pidfile.read_text()), signal.SIGKILL)


def test_a_tree_without_sockets_needs_no_code_for_them(tmp_path: Path) -> None:
    imported = imported_by_restore("memory_random", 4, 1, 1000, directory=tmp_path)
    assert imported & UNWANTED == {"lazyproc.migrate"}  # of that package only what is called for
    assert "lazyproc.migrate.journal" not in imported


def test_a_tree_with_unix_sockets_needs_theirs(tmp_path: Path) -> None:
    """So the list above is not one of modules that nobody imports."""
    imported = imported_by_restore("sock_queues", directory=tmp_path)
    assert "lazyproc.restore.unix" in imported
