"""AIO rings (io_setup(2)): what of their requests can be seen from outside. ADR 0007."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lazyproc.errors import Obstacle
from lazyproc.kernel.tracee import Memory

NAME = "/[aio]"  # of the mapping
_HEAD = struct.Struct("<4I")  # id, nr, head, tail: the start of struct aio_ring, fs/aio.c


class Ring(NamedTuple):
    """A ring of process `pid`, where it is mapped."""

    pid: int
    start: int
    end: int


def unfetched(rings: Iterable[Ring], memory: Memory) -> Iterator[Obstacle]:
    """The rings of one process with completions that it has not fetched: a copy would wait for them in vain.

    Requests under way show nowhere before they are complete. Raises TraceeError for a ring that is gone.
    """
    for ring in rings:
        _, _, head, tail = _HEAD.unpack(memory.read(ring.start, _HEAD.size))
        if head != tail:
            yield Obstacle(
                ring.pid,
                f"mapping {ring.start:#x}-{ring.end:#x} {NAME}",
                "is an AIO ring with completions that the program has not fetched",
                "try again a moment later, or let the program call io_getevents(2) first",
            )
