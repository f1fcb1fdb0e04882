"""What a dump may take along; who asks for a dump may not want all of it."""

from __future__ import annotations

from lazyproc.facts import dataclass

CONTENT_LIMIT = 256 << 20  # bytes of one file that may travel while the tree stands still
MOVED_CONTENT_LIMIT = (
    48 << 20
)  # bytes of all of them in a move: they are a part of IMAGES (MAX_BLOB, wire/frame.py)
# A pager keeps a byte for each page, whether anything is there or not, and looks at all of them in one go: twice as
# many take it so long that its link is given up meanwhile, again and again.
MOVED_PRIVATE_LIMIT = 4 << 40


@dataclass(frozen=True, slots=True)
class Permits:
    """What is not permitted is an obstacle where it occurs."""

    connections: bool = True  # established TCP
    locks: bool = True  # file locks and leases
    write_leases: bool = True  # leases that end as soon as somebody else opens the file
    awaited_locks: bool = True  # those of them that a process outside of the tree waits for
    led_from_outside: bool = True  # sessions and groups whose leader is not in the tree
    first: bool = False  # pid 1 as lazyproc sees it, which can be looked at from there, and not ended
    net_apart: bool = True  # a network namespace of its own, whose other packets pass while it stands still
    private_limit: int | None = None  # bytes of private memory, reserved or used, of all processes
    ghost_limit: int = CONTENT_LIMIT  # bytes of a deleted file
    contents_limit: int | None = None  # bytes of all files whose content travels
    outside: bool = (
        False  # pipes that end in a process outside of the tree: who restores it has to give others
    )
    datagrams_out: bool = (
        False  # unix datagram sockets connected to a name outside of the tree: connected again
    )
    external: frozenset[str] = frozenset()  # what else stays outside, by the names of lazyproc/outside.py


ALL = Permits()
# Who waits for a lock would get it in between the source, which lets go of it, and the destination.
MOVED = Permits(
    write_leases=False,
    awaited_locks=False,
    private_limit=MOVED_PRIVATE_LIMIT,
    contents_limit=MOVED_CONTENT_LIMIT,
)
