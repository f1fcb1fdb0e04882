"""A process that ends while its pages are counted: fewer pages than it had are never taken for all of them."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal

import pytest

from lazyproc.dump.memory import lazy_extents
from lazyproc.errors import NoSuchProcess
from lazyproc.kernel import tracee as ptrace
from lazyproc.model import PAGE
from tests.forked import ending

PAGES = 64


def test_the_pages_of_a_process_that_has_ended_are_not_none() -> None:
    memory = mmap.mmap(-1, PAGES * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"x" * len(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pid = os.fork()
    if pid == 0:
        with ending():
            signal.pause()
    try:
        ranges = [(start, start + len(memory))]
        assert sum(extent.count for extent in lazy_extents(pid, ranges, frozenset())) == PAGES
        with ptrace.memory(pid) as before:
            before.demand_there()
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            with pytest.raises(NoSuchProcess, match=f"pid {pid}"):
                before.demand_there()
        with pytest.raises(NoSuchProcess, match=f"pid {pid}"):
            lazy_extents(pid, ranges, frozenset())
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
