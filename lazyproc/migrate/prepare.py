"""What both sides compare before anything is frozen."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from lazyproc.dump.copies import bytes_of_copies
from lazyproc.dump.walk import thread_ids
from lazyproc.errors import Obstacle, ProtocolError
from lazyproc.facts import dataclass
from lazyproc.kernel import cpu, elf, proc
from lazyproc.model import PAGE
from lazyproc.wire.jsonobject import JsonValue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lazyproc.migrate.room import Room  # of a destination; a source's start does not wait for it

HEADROOM = 64 << 20  # bytes that stay free on the destination
OTHER_PROCESSOR = "choose a host of the same kind"
OTHER_VDSO = "boot the same kernel build on both hosts"


@dataclass(frozen=True, slots=True)
class Offer:
    """The tree as it is just before the freeze: its size, and what it needs of the other host."""

    pages: int
    threads: int
    copies: int  # of the pages: those that are shared here and will not be there
    cpu: Mapping[str, int]
    vdso: str  # build id, hexadecimal

    def fields(self) -> dict[str, JsonValue]:
        return {
            "pages": self.pages,
            "threads": self.threads,
            "copies": self.copies,
            "cpu": dict(self.cpu),
            "vdso": self.vdso,
        }

    @classmethod
    def of(cls, fields: Mapping[str, JsonValue]) -> Offer:
        """From the fields of PREPARE. Raises ProtocolError."""
        pages, threads, words, vdso = (fields.get(key) for key in ("pages", "threads", "cpu", "vdso"))
        copies = fields.get("copies", 0)
        if not (isinstance(pages, int) and isinstance(threads, int) and isinstance(words, dict)):
            raise ProtocolError("PREPARE lacks pages, threads or cpu")
        if not isinstance(copies, int):
            raise ProtocolError("PREPARE's copies is no number")
        if not (isinstance(vdso, str) and all(isinstance(word, int) for word in words.values())):
            raise ProtocolError("PREPARE lacks vdso or has a cpu word that is no number")
        return cls(
            pages,
            threads,
            copies,
            {name: word for name, word in words.items() if isinstance(word, int)},
            vdso,
        )


def offer_of(tree: Mapping[int, Sequence[proc.SmapsEntry]]) -> Offer:
    """What the running tree will ask for; `tree` has the mappings of each process by pid."""
    pages = sum((entry.rss + entry.swap) // PAGE for entries in tree.values() for entry in entries)
    threads = sum(len(thread_ids(pid)) for pid in tree)
    copies = bytes_of_copies(tree.values()) // PAGE
    return Offer(pages, threads, copies, cpu.features(), vdso_build_id().hex())


def vdso_build_id() -> bytes:
    """The build id of this host's vdso, which a process expects where it was (same kernel build)."""
    for entry in proc.maps(proc.read(os.getpid(), "maps")):
        if entry.path == "[vdso]":
            with open("/proc/self/mem", "rb") as memory:
                memory.seek(entry.start)
                return elf.build_id(memory.read(entry.end - entry.start))
    return b""


def objections(offer: Offer, room: Room) -> Iterator[Obstacle]:
    """What about this host as a whole is against the tree."""
    need, copies = offer.pages * PAGE, offer.copies * PAGE
    if need + HEADROOM > room.bytes:
        shared = f", {copies >> 20} of them copies of what is shared since a fork," if copies >> 20 else ""
        left = max(0, room.bytes)
        owed = f" ({room.promised >> 20} MiB more belong to trees that are still getting theirs)"
        yield Obstacle(
            0, "host", f"the tree has {need >> 20} MiB{shared} and {room.whose} {left >> 20} MiB available"
            f"{owed if room.promised else ''}",
            f"{f'raise its {room.limit}' if room.limit else 'free memory there'}, or use receive --overcommit",
        )  # fmt: skip
    lacking = cpu.missing(offer.cpu, cpu.features())
    if lacking:
        why = f"its processor lacks features the process may use ({cpu_text(lacking)})"
        yield Obstacle(0, "host", why, OTHER_PROCESSOR)
    if offer.vdso != vdso_build_id().hex():
        yield Obstacle(0, "host", "its kernel has another vdso", OTHER_VDSO)


def cpu_text(words: Mapping[str, int]) -> str:
    """Feature words as they are said to people."""
    return ", ".join(f"{name} {bits:#x}" for name, bits in words.items())
