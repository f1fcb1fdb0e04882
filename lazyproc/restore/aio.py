"""AIO rings: made anew by io_setup(2), and moved to where the program knows them (their address is their number)."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Sequence

from lazyproc.errors import RestoreError
from lazyproc.kernel.cpu import possible_cpus
from lazyproc.kernel.remote import MAP_FIXED_NOREPLACE, Call
from lazyproc.model import PAGE, Vma, VmaKind
from lazyproc.restore.site import Site

MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MAP_NORESERVE = 0x4000  # Python 3.11 does not know it
HEADER = EVENT = 32  # bytes of struct aio_ring and of struct io_event, fs/aio.c
HEAD_AND_TAIL = struct.Struct("<2I")
HEAD_AT = 8  # in struct aio_ring


def demand_fetched(vpid: int, vmas: Sequence[Vma], read: Callable[[int, int], bytes]) -> None:
    """Raise RestoreError for a ring with completions that the program has not fetched: CRIU dumps those too."""
    for ring in _rings(vmas):
        head, tail = HEAD_AND_TAIL.unpack(read(ring.start + HEAD_AT, HEAD_AND_TAIL.size))
        if head != tail:
            raise RestoreError(
                "is an AIO ring with completions that the program has not fetched",
                where=f"pid {vpid}, mapping {ring.start:#x}-{ring.end:#x}",
                remedy="restore it with criu",
            )


def reserve_calls(vmas: Sequence[Vma]) -> Iterator[Call]:
    """Keep the places of all rings free: io_setup(2) chooses its own, and a ring cannot be moved onto itself."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    for ring in _rings(vmas):
        yield Call("mmap", (ring.start, ring.length, 0, flags, -1, 0))


def make_rings(site: Site, vmas: Sequence[Vma]) -> None:
    """The rings of a task, idle, each in its place. Raises RestoreError."""
    for ring in _rings(vmas):
        number = site.bench.room(8)
        site.run(Call("io_setup", (requests_for(ring.length, possible_cpus()), number)))
        (addr,) = struct.unpack("<Q", site.memory.read(number, 8))
        site.run(Call("mremap", (addr, ring.length, ring.length, MREMAP_MAYMOVE | MREMAP_FIXED, ring.start)))


def requests_for(length: int, cpus: int) -> int:
    """What to ask io_setup(2) for so that its ring has `length` bytes (fs/aio.c, ioctx_alloc and aio_setup_ring).

    Raises RestoreError where a host with so many processors makes every ring larger.
    """
    wanted = ((length - HEADER) // EVENT - 2) // 2
    events = 2 * max(wanted, 4 * cpus) + 2
    size = -(-(HEADER + EVENT * events) // PAGE) * PAGE
    if size != length:
        raise RestoreError(
            f"an AIO ring has {size} bytes on this host, which has {cpus} possible processors, and {length} at its old",
            where="io_setup",
            remedy="choose a host with no more processors (/sys/devices/system/cpu/possible)",
        )
    return wanted


def _rings(vmas: Sequence[Vma]) -> list[Vma]:
    return [vma for vma in vmas if vma.kind is VmaKind.AIO]
