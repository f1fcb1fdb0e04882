"""Lazy memory in our own process: the test itself is who faults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lazyproc.errors import UsageError
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.uffd.region import LazyRegion
from tests.live.lazy_rig import DEADLINE, content

DATA = content(64)


def source(offset: int, length: int) -> bytes:
    return DATA[offset : offset + length]


def test_memory_is_filled_when_touched() -> None:
    region = LazyRegion(len(DATA), source)
    with region as memory:
        assert memory[5 * PAGE + 7] == DATA[5 * PAGE + 7]
        assert region.counters().urgent == 1
        memory[9 * PAGE] = 1
        assert bytes(memory[9 * PAGE : 10 * PAGE]) == b"\1" + DATA[9 * PAGE + 1 : 10 * PAGE]
        assert region.counters().urgent == 2


def test_bulk_fills_it_in_the_background() -> None:
    region = LazyRegion(len(DATA), source, bulk=True)
    with region as memory:
        assert region.wait(DEADLINE)
        assert bytes(memory) == DATA


def test_a_forked_process_sees_it_too() -> None:
    with LazyRegion(len(DATA), source) as memory:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if bytes(memory) == DATA else 1)
        assert os.waitpid(pid, 0) == (pid, 0)


FORKED = """
import os, sys
from lazyproc.uffd.region import LazyRegion

with LazyRegion(1 << 20, lambda _offset, length: b"x" * length) as memory:
    if os.fork() == 0:
        sys.exit()
    os.wait()
    print(chr(memory[0]))
"""


def test_a_forked_process_that_leaves_takes_nothing_with_it() -> None:
    assert output_of(FORKED) == "x\n"


def test_pages_of_a_page_source() -> None:
    obj = MemoryObject(ObjectKind.TASK, 9)

    class Pages:
        def extents(self) -> dict[MemoryObject, tuple[Extent, ...]]:
            return {obj: (Extent(0x10000, 64, lazy=True),)}

        def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
            return DATA[addr - 0x10000 : addr - 0x10000 + count * PAGE]

    with LazyRegion.of_pages(Pages(), obj, 0x11000, 8) as memory:
        assert bytes(memory) == DATA[PAGE : 9 * PAGE]


def test_a_source_that_fails_is_told_and_nobody_reads_zeros() -> None:
    def short(_offset: int, length: int) -> bytes:
        return bytes(length - 1)

    region = LazyRegion(len(DATA), short)
    with region as memory:
        pid = os.fork()  # who touches it waits for ever, so not us
        if pid == 0:
            os._exit(memory[0])
        assert not region.wait(DEADLINE)
        assert "connection broke" in region.lost
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


INTERRUPTED = """
import os, signal
from lazyproc.uffd.region import LazyRegion

def source(_offset, length):
    os.killpg(main, signal.SIGINT)
    return b"x" * length

main = os.getpid()
signal.signal(signal.SIGINT, signal.default_int_handler)
with LazyRegion(4096, source) as memory:
    try:
        found = memory[0]
        os.getpid()
    except KeyboardInterrupt:
        print("interrupted")
"""


def output_of(program: str) -> str:
    argv = [sys.executable, "-c", program]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            return process.communicate(timeout=DEADLINE)[0]
        finally:
            process.kill()


def test_ctrl_c_while_a_page_is_waited_for_is_an_interrupt() -> None:
    assert output_of(INTERRUPTED) == "interrupted\n"


REAPED = """
import signal
from lazyproc.uffd.region import LazyRegion

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
with LazyRegion(4096, lambda _offset, length: b"x" * length) as memory:
    found = chr(memory[0])
print(found)
"""


def test_where_children_are_reaped_unasked() -> None:
    assert output_of(REAPED) == "x\n"


SLICED = """
from lazyproc.uffd.region import LazyRegion

try:
    with LazyRegion(1 << 20, lambda _offset, length: b"x" * length) as memory:
        part = memory[4096:]
except BufferError:
    print(chr(part[0]))
"""


def test_who_ends_with_a_part_of_it_in_use_ends() -> None:
    assert output_of(SLICED) == "x\n"


@pytest.mark.parametrize("length", [0, -PAGE, PAGE + 1])
def test_odd_lengths(length: int) -> None:
    with pytest.raises(UsageError, match="multiple of 4096"):
        LazyRegion(length, source)
