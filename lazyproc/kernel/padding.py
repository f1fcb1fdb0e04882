"""Room for a few instructions of ours in a process where nothing can be mapped yet, or any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lazyproc.errors import TraceeError
from lazyproc.kernel.proc import MapsEntry
from lazyproc.kernel.tracee import Memory


def padding(
    maps: Sequence[MapsEntry],
    memory: Memory,
    room: int,
    *,
    behind: int,
    stale: Callable[[bytes], bool],
    ips: Iterable[int],
) -> int:
    """The address of `room` executable bytes that mean nothing, with `behind` bytes between them and their mapping's
    end: zeros behind the vdso's code, or behind that of a file.

    What a killed tracer has left there (`stale` knows it) means nothing either, unless one of the threads, whose
    instruction pointers are `ips`, still stands in it. Raises TraceeError.
    """
    executable = [m for m in maps if "x" in m.perms and m.path != "[vsyscall]"]
    standing = tuple(ips)
    for entry in sorted(executable, key=lambda m: m.path != "[vdso]"):
        addr = entry.end - behind - room
        if addr < entry.start:
            continue
        content = memory.read(addr, room)
        occupied = any(addr <= ip < addr + room for ip in standing)
        if not any(content) or (stale(content) and not occupied):
            return addr
    raise TraceeError(
        "no executable padding for a remote call", where="process", remedy="report it with its maps"
    )
