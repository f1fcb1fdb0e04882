"""A C program that touches lazy memory from all sides at once and verifies every word of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest

from lazyproc.kernel import proc
from lazyproc.kernel import sys as kernel
from lazyproc.model import PAGE, Extent
from lazyproc.runs import Segment
from lazyproc.uffd.pager import Pager
from tests.live.lazy_rig import DEADLINE, TASK, Server, balanced, pager, whole
from tests.live.programs import wait_until

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def toucher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("toucher") / "toucher"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc", *flags, HERE / "toucher.c", "-o", binary], check=True)
    return binary


@pytest.fixture(scope="session")
def movers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("movers") / "movers"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc", *flags, HERE / "movers.c", "-o", binary], check=True)
    return binary


def words(length: int) -> bytes:
    index = numpy.arange(1, length // 8 + 1, dtype=numpy.uint64)
    return (index * numpy.uint64(0x9E3779B97F4A7C15)).tobytes()


@dataclass
class Toucher:
    process: subprocess.Popen[bytes]
    ranges: tuple[tuple[int, int], tuple[int, int]]
    uffd: int

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def go(self) -> int:
        """Its exit status, once it has verified everything."""
        self.process.communicate(b"\n", timeout=60)
        return self.process.returncode


@contextmanager
def running(binary: Path, mib: int, threads: int) -> Iterator[Toucher]:
    with subprocess.Popen(
        [binary, str(mib), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            theirs, addr, length, side, side_length = map(int, process.stdout.readline().split())
            pidfd = kernel.pidfd_open(process.pid)
            uffd = kernel.pidfd_getfd(pidfd, theirs)
            os.close(pidfd)
            yield Toucher(process, ((addr, length), (side, side_length)), uffd)
        finally:
            process.kill()


def join(made: Pager, target: Toucher, source: Server) -> None:
    """One object for both ranges: the rest of the space between them has no region."""
    space = made.add_space(target.uffd)
    for addr, length in target.ranges:
        made.add_region(space, addr, length, TASK, addr)
    made.serve_remote(*source.connect())
    made.apply_map(
        {TASK: [extent for addr, length in target.ranges for extent in whole(addr, length // PAGE)]}
    )


class Ranges(Server):
    """A server of several ranges of one object."""

    def page(self, key: int, addr: int) -> bytes | None:
        for start, data in self.objects.values():
            if start <= addr < start + len(data):
                return data[addr - start : addr - start + PAGE]
        return None


@pytest.mark.parametrize("bulk", [False, True], ids=["demand", "bulk"])
def test_random_access_while_memory_moves(toucher: Path, bulk: bool) -> None:
    with running(toucher, 64, 3) as target, pager() as made:
        source = Ranges(
            {number: (addr, words(length)) for number, (addr, length) in enumerate(target.ranges)}
        )
        try:
            join(made, target, source)
            made.start(bulk=bulk)
            assert target.go() == 0
            assert made.wait(DEADLINE)
            assert balanced(made)
            counters = made.counters()
            assert counters.total == sum(length for _, length in target.ranges) // PAGE
            side = target.ranges[1][1] // PAGE
            assert counters.dropped <= side  # nothing of what was only verified
            assert counters.dropped or bulk
        finally:
            source.close()


def image_of(made: Pager, target: Toucher, folder: Path, *, holes: bool = False) -> None:
    """All of it comes from a file on this machine; with `holes` every other page."""
    space = made.add_space(target.uffd)
    with open(folder / "pages-1.img", "w+b") as image:
        segments = []
        for addr, length in target.ranges:
            made.add_region(space, addr, length, TASK, addr)
            segments.append(Segment(TASK.key, addr, addr + length, image.fileno(), image.tell()))
            image.write(words(length))
        image.flush()
        made.serve_segments(segments)
    extents = [extent for addr, length in target.ranges for extent in whole(addr, length // PAGE)]
    if holes:
        extents = [Extent(addr, 1, lazy=True) for e in extents for addr in range(e.addr, e.end, 2 * PAGE)]
    made.apply_map({TASK: extents})


def test_without_server_help(toucher: Path, tmp_path: Path) -> None:
    with running(toucher, 64, 3) as target, pager() as made:
        image_of(made, target, tmp_path)
        made.start()
        assert target.go() == 0
        assert made.wait(DEADLINE)
        assert balanced(made)


@pytest.mark.parametrize("turn", range(10))
def test_what_moves_while_it_is_put_in_place_is_not_lost(toucher: Path, tmp_path: Path, turn: int) -> None:
    """A copy of one page that finds nothing mapped (ENOENT) has met a mremap(2) whose message is still to come. Taken
    for gone, a page is lost in every third turn.
    """
    with running(toucher, 16, 0) as target, pager() as made:
        image_of(made, target, tmp_path, holes=True)
        made.start(bulk=True)
        target.begin()
        assert made.wait(DEADLINE)  # before it may end
        assert target.go() == 0
        assert balanced(made)
        assert made.counters().dropped == 0


@pytest.mark.parametrize("pairs", [1, 2000], ids=["forced", "raced"])
def test_memory_that_moves_to_where_another_thread_has_just_moved_away(
    movers: Path, tmp_path: Path, pairs: int
) -> None:
    """The kernel tells of both moves when they have been made, and may tell of the second one first. Who moves away is
    told that his old place is unmapped when he has heard of the new one: after the second move, if the pager begins
    when both wait to be heard.
    """
    pages = 2
    argv: list[Path | str] = [movers, str(pairs), str(pages)]
    with (
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
        pager() as made,
        open(tmp_path / "pages-1.img", "w+b") as image,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        pid, theirs, *areas = map(int, process.stdout.readline().split())
        pidfd = kernel.pidfd_open(pid)
        space = made.add_space(kernel.pidfd_getfd(pidfd, theirs))
        os.close(pidfd)
        starts = [area + pair * 2 * pages * PAGE for area in sorted(areas) for pair in range(pairs)]
        segments = []
        for start in starts:
            made.add_region(space, start, pages * PAGE, TASK, start)
            segments.append(Segment(TASK.key, start, start + pages * PAGE, image.fileno(), image.tell()))
            for addr in range(start, start + pages * PAGE, PAGE):
                image.write(addr.to_bytes(8, "little").ljust(PAGE, b"\1"))
        image.flush()
        made.serve_segments(segments)
        made.apply_map({TASK: [extent for start in starts for extent in whole(start, pages)]})
        try:
            process.stdin.write(b"\n")
            process.stdin.flush()
            if pairs == 1:
                wait_until(lambda: not is_mapped(pid, areas[1]), "both have moved")
            made.start(bulk=False)
            assert process.communicate(timeout=60)[0] == b"0\n"
            assert made.counters().dropped == 0
        finally:
            process.kill()


def is_mapped(pid: int, addr: int) -> bool:
    return any(entry.start <= addr < entry.end for entry in proc.maps(proc.read(pid, "maps")))
