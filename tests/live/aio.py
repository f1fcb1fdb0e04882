"""Talking to tests/programs/aio_ring.c, and seeing into its rings."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path

from lazyproc.kernel import proc
from tests.live.programs import Program

LEAVE, FETCH = signal.SIGUSR1, signal.SIGUSR2
POLL_MS = 1500  # longer than a migration takes to the freeze, on a busy machine


def unfetched(pid: int) -> int:
    """Completions in the rings of a process (struct aio_ring of fs/aio.c: id, nr, head, tail)."""
    count = 0
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for entry in proc.maps(proc.read(pid, "maps")):
            if entry.path == "/[aio]":
                memory.seek(entry.start)
                _, _, head, tail = struct.unpack("<4I", memory.read(16))
                count += tail != head
    return count


def ask(program: Program, what: signal.Signals) -> None:
    """It has one thread: two rounds later it is done."""
    os.kill(program.pid, what)
    program.watch.wait_beats()
