"""What CRIU leaves to userfaultfd, by its images."""

from __future__ import annotations

import pytest

from lazyproc.errors import ImageError
from lazyproc.images.files import ImageWriter
from lazyproc.images.lazy import LazyMemory, highest_descriptor, lazy_memory, places
from lazyproc.images.pb import files_pb2, process_pb2
from lazyproc.model import PAGE, Extent

ANONYMOUS, SHARED, LOCKED, HUGE = 0x22, 0x21, 0x2022, 0x40022  # MAP_*, as mmap(2) takes them
REGULAR, VDSO = 1 << 0 | 1 << 9, 1 << 0 | 1 << 3 | 1 << 9
FIELDS = (
    "start_code", "end_code", "start_data", "end_data", "start_stack", "start_brk", "brk",
    "arg_start", "arg_end", "env_start", "env_end",
)  # fmt: skip


def images(*vmas: tuple[int, int, int, int]) -> dict[str, bytes]:
    """Of process 7 with one thread and these mappings (first page, pages, flags, status), and of the zombie 8."""
    writer = ImageWriter()
    for pid, threads in ((7, [7]), (8, [])):
        writer.add("pstree.img", process_pb2.pstree_entry(pid=pid, ppid=0, pgid=7, sid=7, threads=threads))
    mm = process_pb2.mm_entry(exe_file_id=1)
    for field in FIELDS:
        setattr(mm, f"mm_{field}", 0)
    for first, count, flags, status in vmas:
        mm.vmas.add(
            start=first * PAGE, end=(first + count) * PAGE, pgoff=0, shmid=0, prot=3, flags=flags, status=status, fd=-1
        )  # fmt: skip
    writer.add("mm-7.img", mm)
    return writer.finish()


def test_lazy_is_what_is_private_anonymous_and_may_wait() -> None:
    found = lazy_memory(
        images(
            (1, 2, ANONYMOUS, REGULAR),
            (3, 1, ANONYMOUS, REGULAR),
            (4, 1, LOCKED, REGULAR),
            (5, 1, HUGE, REGULAR),
            (6, 1, SHARED, REGULAR),
            (7, 1, ANONYMOUS, VDSO),
            (9, 1, ANONYMOUS, REGULAR),
        )
    )
    assert found == (LazyMemory(7, ((PAGE, 4 * PAGE), (9 * PAGE, 10 * PAGE))), LazyMemory(8, None))


def test_a_lazy_page_outside_is_refused() -> None:
    memory = LazyMemory(7, ((PAGE, 4 * PAGE), (9 * PAGE, 10 * PAGE)))
    memory.demand_covers([Extent(PAGE, 3, lazy=True), Extent(9 * PAGE, 1, lazy=True)])
    for addr, count in ((0, 1), (PAGE, 4), (5 * PAGE, 1), (8 * PAGE, 2), (10 * PAGE, 1)):
        with pytest.raises(ImageError, match="its mapping cannot be"):
            memory.demand_covers([Extent(addr, count, lazy=True)])
        assert memory.covers(addr) == (addr == PAGE)


def test_no_process_is_no_tree() -> None:
    with pytest.raises(ImageError, match="no process"):
        lazy_memory({})
    with pytest.raises(ImageError, match="core-7"):
        list(places(images()))


def test_the_highest_descriptor_of_all_tables() -> None:
    writer = ImageWriter()
    for table, numbers in ((1, (0, 900)), (2, (3,))):
        for fd in numbers:
            entry = files_pb2.fdinfo_entry(id=1, flags=0, type=files_pb2.REG, fd=fd)
            writer.add(f"fdinfo-{table}.img", entry)
    assert highest_descriptor(writer.finish()) == 900
    assert highest_descriptor({}) == -1
