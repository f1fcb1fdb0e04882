"""What is done while a tree stands still grows as the tree does, and not with its square.

Counted are calls of Python and C functions, by cProfile, and not times: with four times as many things the second
half of the growth is twice the first where it is a straight line, and four times where it is a square.
"""

from __future__ import annotations

import json
import os
import pstats
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.live.moving import CLI
from tests.needs import require_root

pytestmark = pytest.mark.slow

FEW = 60
STEEPEST = 2.5
BEGIN = """
import mmap, os, select, socket, sys
folder, n, kept = sys.argv[1], int(sys.argv[2]), []
"""
END = """
os.write(1, b"ready")
os.close(1)
select.poll().poll()
"""
KINDS = {
    "tcp": """
listener = socket.create_server(("127.0.0.1", 0))
for _ in range(n):
    kept += [socket.create_connection(listener.getsockname()), listener.accept()[0]]
""",
    "tcp listening": 'kept = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]',
    "udp": """
for _ in range(n):
    kept.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    kept[-1].bind(("127.0.0.1", 0))
""",
    "unix pairs": "kept = [socket.socketpair() for _ in range(n)]",
    "unix accepted": """
listener = socket.socket(socket.AF_UNIX)
listener.bind(folder + "/listener")
listener.listen(n)
for _ in range(n):
    kept.append(socket.socket(socket.AF_UNIX))
    kept[-1].connect(folder + "/listener")
    kept.append(listener.accept()[0])
""",
    "deleted files": """
for number in range(n):
    kept.append(os.open(f"{folder}/{number}", os.O_RDWR | os.O_CREAT))
    os.unlink(f"{folder}/{number}")
""",
    "shared memory": "kept = [mmap.mmap(-1, 4096, mmap.MAP_SHARED) for _ in range(n)]",
    "watched pipes": """
epoll = select.epoll()
for _ in range(n):
    kept.append(os.pipe())
    epoll.register(kept[-1][0], select.EPOLLIN)
""",
    "processes": """
for _ in range(n // 6):
    if os.fork() == 0:
        os.close(1)
        select.poll().poll()
""",
}


@contextmanager
def _standing(kind: str, folder: Path, count: int) -> Iterator[int]:
    """The pid of a program that has so many of them; it leads a group of its own."""
    code, null = BEGIN + KINDS[kind] + END, subprocess.DEVNULL
    argv = [sys.executable, "-I", "-S", "-c", code, str(folder), str(count)]
    with subprocess.Popen(
        argv, stdin=null, stdout=subprocess.PIPE, stderr=null, start_new_session=True
    ) as program:
        assert program.stdout is not None
        try:
            assert program.stdout.read() == b"ready"
            yield program.pid
        finally:
            _end(program.pid)


def _end(pid: int) -> None:
    """With its group."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _calls(profile: Path, *words: object) -> tuple[int, str]:
    """How many a command makes, and what it says."""
    argv = [sys.executable, "-m", "cProfile", "-o", profile, *CLI[1:], *words]
    done = subprocess.run([*map(str, argv)], capture_output=True, text=True, check=True)
    return int(pstats.Stats(str(profile)).total_calls), done.stdout  # type: ignore[attr-defined]


def _calls_of_both(kind: str, folder: Path, count: int) -> tuple[int, int]:
    folder.mkdir()
    images = folder / "images"
    with _standing(kind, folder, count) as pid:
        of_checkpoint, _ = _calls(folder / "profile", "checkpoint", pid, "-D", images)
    of_restore, said = _calls(folder / "profile", "restore", "-D", images, "--detach", "--json")
    _end(json.loads(said)["root_pid"])
    return of_checkpoint, of_restore


@pytest.mark.parametrize("kind", KINDS)
def test_a_straight_line(kind: str, tmp_path: Path) -> None:
    require_root()
    counts = [FEW, 2 * FEW, 4 * FEW]
    found = [_calls_of_both(kind, tmp_path / str(count), count) for count in counts]
    for what, (few, more, most) in zip(("checkpoint", "restore"), zip(*found, strict=True), strict=True):
        assert most - more < STEEPEST * (more - few), f"{what}: {few}, {more}, {most}"
