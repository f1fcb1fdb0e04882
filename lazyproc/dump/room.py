"""What asking a process takes of its address space, and whether its limits let it have that."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lazyproc.kernel import proc
from lazyproc.kernel.remote import code_size
from lazyproc.model import PAGE

OF_PROCESS = 1 << 16  # bytes of a bench for what is asked of a process once
OF_THREAD = 512  # of its question: its room, and the rows of its calls
OF_TIMER = 256  # of a POSIX timer


def room_to_ask(threads: int, timers: int) -> int:
    """Bytes of data that the bench has."""
    return PAGE * -(-(OF_PROCESS + OF_THREAD * threads + OF_TIMER * timers) // PAGE)


class Shortage(NamedTuple):
    """A limit that has no room for `wanted` bytes beside the `taken` ones."""

    name: str  # of prlimit(1)
    taken: int
    wanted: int
    limit: int


def shortages(
    smaps: Sequence[proc.SmapsEntry], limits: Sequence[tuple[int, int]], threads: int, timers: int
) -> Iterator[Shortage]:
    """The limits that leave no room (may_expand_vm, mm/mmap.c). Pure."""
    data = room_to_ask(threads, timers)
    sizes = [(each, each.entry.end - each.entry.start) for each in smaps if each.entry.path != "[vsyscall]"]
    of_data = sum(size for each, size in sizes if _is_data(each))
    for name, number, taken, wanted in (
        ("as", resource.RLIMIT_AS, sum(size for _, size in sizes), code_size(threads) + data),
        ("data", resource.RLIMIT_DATA, of_data, data),
    ):
        limit = limits[number][0]
        if taken + wanted > limit:
            yield Shortage(name, taken, wanted, limit)


def _is_data(mapping: proc.SmapsEntry) -> bool:
    """is_data_mapping(), mm/vma.h."""
    flags = mapping.vm_flags
    return "wr" in flags and not flags & {"sh", "gd"}
