"""The RAM blocks of a QEMU: their names by its monitor, their places by its own list of them.

"info ramblock" prints names and sizes, but before QEMU 9.0 no addresses. Each block is a `struct RAMBlock` on QEMU's
heap (include/exec/ramblock.h) that holds the name as an array of 256 bytes, and shortly before it the address and both
sizes: so the name is looked for in memory, and what stands before it decides. Blocks of one size are not mixed up.
Right behind the name is its place in the list of all (QLIST_ENTRY, include/qemu/queue.h): from one that was found the
others are followed, and a list that has just all of them and points back to itself everywhere ends the search.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from lazyproc.errors import HostLacks, Obstacle, PermissionDenied, ProtocolError
from lazyproc.facts import dataclass
from lazyproc.kernel import proc
from lazyproc.kernel.proc import MapsEntry
from lazyproc.model import PAGE, MemoryObject, ObjectKind

WORDS = 16  # how many 8-byte words before the name host, used_length and max_length are sought
PIECE = 1 << 20
ARENA = 64 << 20  # bytes that malloc(3) reserves for a thread; what is larger is RAM, or the code of TCG
NAME_SIZE = 256  # RAMBlock.idstr
BLOCK = 1024  # bytes of a RAMBlock in which its links are
OTHERWISE = "save the guest with QEMU's own migration instead"
_UNITS = {None: 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
# A name may have spaces, or be none; behind the sizes newer QEMUs have more columns.
_ROW = re.compile(
    r" *((?:\S.*?)??) +(\d+) ([KMGT]i)?B +0x[0-9a-f]+ +0x([0-9a-f]+) +0x([0-9a-f]+)(?: .*)?", re.ASCII
)
_TITLE = re.compile(r" *Block Name +PSize .*")


@dataclass(frozen=True, slots=True)
class Named:
    """A row of "info ramblock"; sizes in bytes."""

    name: str
    page_size: int
    used: int
    total: int


@dataclass(frozen=True, slots=True)
class Block:
    """A RAM block and where it lies. Its pages are [0, used) of `object`, which is private or shared memory."""

    name: str
    used: int  # bytes
    total: int
    page_size: int
    shared: bool
    addr: int  # in QEMU's address space
    number: int  # its place in the list, by which its pages are asked for
    of_file: bool = False  # private, and what was not written to is a file's

    @property
    def object(self) -> MemoryObject:
        kind = ObjectKind.SHARED if self.shared else ObjectKind.TASK
        return MemoryObject(kind, self.number + 1)

    @property
    def named(self) -> Named:
        return Named(self.name, self.page_size, self.used, self.total)

    def row(self) -> list[Any]:
        """What the other host has to know of it."""
        return [self.name, self.used, self.total, self.page_size, self.shared]

    @classmethod
    def of(cls, number: int, row: Sequence[Any], addr: int = 0) -> Block:
        """From a row. Raises TypeError, ValueError."""
        name, used, total, page_size, shared = row
        found = cls(str(name), int(used), int(total), int(page_size), shared is True, addr, number)
        if not 0 <= found.used <= found.total or found.used % PAGE:
            raise ValueError(f"a block of {used} bytes in {total}")
        return found


def rows(text: str) -> tuple[Named, ...]:
    """What "info ramblock" prints. What has no name there does not move with QEMU's own migration either: memory that
    no device uses, or guest.UNNAMED. The page size is written as "4 KiB" there (util/cutils.c size_to_str). Raises
    ProtocolError for a line that cannot be read: a block that is left out would be zeros where the guest goes on.
    """
    found = (_row(line) for line in text.splitlines() if line.strip() and not _TITLE.fullmatch(line))
    return tuple(each for each in found if each.name)


def _row(line: str) -> Named:
    found = _ROW.fullmatch(line)
    if found is None:
        raise ProtocolError(
            f"a RAM block that cannot be understood: {line.strip()!r:.200}",
            where="QMP info ramblock",
            remedy=f"{OTHERWISE}; please report QEMU's version",
        )
    name, number, unit, used, total = found.groups()
    return Named(name, int(number) * _UNITS[unit], int(used, 16), int(total, 16))


def blocks(pid: int, named: Sequence[Named]) -> tuple[Block, ...]:
    """Where the blocks lie, in the order of their names. Raises HostLacks when one cannot be found for certain,
    PermissionDenied.
    """
    maps = {entry.start: entry for entry in proc.maps(proc.read(pid, "maps"))}
    with permitted(pid), open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        places = _places(pid, mem.fileno(), {each.name: each for each in named}, maps)
    found = []
    for number, each in enumerate(sorted(named, key=lambda each: each.name)):
        hosts = places[each.name]
        if len(hosts) != 1:
            raise HostLacks(
                f"the RAM block {each.name!r} of {each.total} bytes "
                + ("cannot be found in its memory" if not hosts else f"may lie at {_all(hosts)}"),
                where=f"pid {pid}",
                remedy=f"{OTHERWISE}; please report QEMU's version",
            )
        (addr,) = hosts
        shared = maps[addr].perms.endswith("s")
        of_file = not shared and is_of_file(maps[addr])
        found.append(Block(each.name, each.used, each.total, each.page_size, shared, addr, number, of_file))
    return tuple(found)


@contextmanager
def permitted(pid: int) -> Iterator[None]:
    """Inside, what the kernel does not let us see of a QEMU is PermissionDenied."""
    try:
        yield
    except PermissionError as error:
        raise PermissionDenied(
            f"its memory may not be read ({error.strerror})",
            where=f"pid {pid}",
            remedy="run lazyproc as root",
        ) from error


def is_of_file(entry: MapsEntry) -> bool:
    """Also a memfd or shared memory without a name."""
    return entry.path.startswith("/")


def _places(
    pid: int, mem: int, named: Mapping[str, Named], maps: Mapping[int, MapsEntry]
) -> Mapping[str, set[int]]:
    """Where each block may lie."""
    places: dict[str, set[int]] = {name: set() for name in named}
    for heap in _heaps(pid, maps.values()):
        for addr, data in (piece for entry in heap for piece in _pieces(mem, entry.start, entry.end)):
            for each in named.values():
                for at, host in _hosts(data, addr, each, maps):
                    if listed := _listed(mem, at, named, maps):
                        return listed
                    places[each.name].add(host)
        if all(places.values()):
            break
    return places


def _all(hosts: Iterable[int]) -> str:
    return ", ".join(f"{host:#x}" for host in sorted(hosts))


def _heaps(pid: int, maps: Iterable[MapsEntry]) -> Iterator[Sequence[MapsEntry]]:
    """Where malloc(3) may have put them, the likeliest first: the heap is the first thread's, which makes RAM blocks;
    other threads have arenas. What is larger is taken one by one, the smallest first. Only where the heap has not all
    is it asked what is in use: for smaps the kernel walks all of the guest's memory.
    """
    yield [each for each in maps if each.path == "[heap]"]
    anonymous = [
        each.entry
        for each in proc.smaps(proc.read(pid, "smaps"))
        if each.entry.perms == "rw-p" and each.rss > 0 and each.entry.path == ""
    ]
    yield [each for each in anonymous if each.end - each.start <= ARENA]
    larger = [each for each in anonymous if each.end - each.start > ARENA]
    yield from ([each] for each in sorted(larger, key=lambda each: each.end - each.start))


def _pieces(mem: int, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The memory in pieces that overlap by what a RAMBlock takes; pages that cannot be read are left out."""
    overlap = NAME_SIZE + 8 * WORDS
    for addr in range(start, end, PIECE):
        try:
            yield addr, os.pread(mem, min(PIECE + overlap, end - addr), addr)
        except OSError:
            continue


def _hosts(data: bytes, addr: int, named: Named, maps: Mapping[int, MapsEntry]) -> Iterator[tuple[int, int]]:
    """Where the name stands in what can only be its RAMBlock, with each address that stands before it."""
    name = named.name.encode() + b"\0"
    at = data.find(name)
    while at >= 0:
        if (addr + at) % 4 == 0:  # idstr follows a u32
            start = (addr + at) // 8 * 8 - addr
            first = max(0, start - 8 * WORDS)
            first += -(addr + first) % 8
            count = (start - first) // 8
            words = struct.unpack_from(f"<{count}Q", data, first)
            if named.used in words and named.total in words:
                for word in words:
                    if word in maps and _room(maps, word) >= _whole(named.total):
                        yield addr + at, word
        at = data.find(name, at + 1)


def _listed(
    mem: int, at: int, named: Mapping[str, Named], maps: Mapping[int, MapsEntry]
) -> Mapping[str, set[int]]:
    """All blocks by the list that the one with its name at `at` is in; none unless just those `named` are in it."""
    found: dict[str, set[int]] = {}
    with suppress(OSError, ValueError, struct.error):  # it leads elsewhere
        for place in _walk(mem, at, named):
            each = named.get(_name(mem, place))
            if each is None or each.name in found:
                return {}
            start = place // 8 * 8 - 8 * WORDS
            data = os.pread(mem, place + NAME_SIZE - start, start)
            found[each.name] = {host for where, host in _hosts(data, start, each, maps) if where == place}
    return found if len(found) == len(named) and all(len(hosts) == 1 for hosts in found.values()) else {}


def _walk(mem: int, at: int, named: Container[str]) -> Iterator[int]:
    """Where the names in the list are: the one at `at`, those before it, those behind it. Each link points to the next
    block, and behind it stands where the link to this one is: in the block before, or in the head of the list.
    """
    yield at
    back = link = -(-(at + NAME_SIZE) // 8) * 8
    behind = link - at
    while _name(mem, (back := _word(mem, back + 8)) - behind) in named:
        yield back - behind
    while start := _word(mem, link):
        link = start + os.pread(mem, BLOCK, start).index(struct.pack("<Q", link)) - 8
        yield link - behind


def _word(mem: int, addr: int) -> int:
    (word,) = struct.unpack("<Q", os.pread(mem, 8, addr))
    return int(word)


def _name(mem: int, addr: int) -> str:
    return os.pread(mem, NAME_SIZE, addr).partition(b"\0")[0].decode(errors="replace")


def _whole(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _room(maps: Mapping[int, MapsEntry], start: int) -> int:
    """Bytes from the start of a mapping to the end of the last that follows without a gap and is of the same kind."""
    end, perms = start, maps[start].perms
    while end in maps and maps[end].perms == perms:
        end = maps[end].end
    return end - start


def differences(ours: Sequence[Block], theirs: Sequence[Block]) -> Iterator[Obstacle]:
    """What the other QEMU, the source of a guest, has and ours lacks, or has otherwise, or the other way round."""
    known = {each.name: each for each in ours}
    for each in theirs:
        own = known.pop(each.name, None)
        if own is None or (own.total, own.shared, own.page_size) != (each.total, each.shared, each.page_size):
            yield _different(each.name, own, each)
        elif own.of_file:
            yield Obstacle(
                0,
                f"RAM block {own.name}",
                "lies in a file there, privately: what is in the file would be there before it has come",
                "start the QEMU there with memory-backend-ram in place of the file",
            )
    for own in known.values():
        yield _different(own.name, own, None)


def _different(name: str, own: Block | None, other: Block | None) -> Obstacle:
    return Obstacle(
        0,
        f"RAM block {name}",
        f"is not the same in both QEMUs ({_kind(other)} at the source, {_kind(own)} at the destination)",
        "start the QEMU there with the same machine, devices and memory",
    )


def _kind(block: Block | None) -> str:
    if block is None:
        return "none"
    return f"{block.total} bytes, {'shared' if block.shared else 'private'}, pages of {block.page_size}"
