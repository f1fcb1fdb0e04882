"""At the source: why pages that are missing at the destination can never be given."""

from __future__ import annotations

from lazyproc.errors import LostAfterCommit


def asked_again(addr: int) -> LostAfterCommit:
    """The destination wants a page which it had said to have (`--release`)."""
    return LostAfterCommit(
        f"the destination asks again for the page at {addr:#x}, which it had acknowledged and which is freed here",
        remedy="the process waits there for that page: end it with lazyproc abort on both hosts",
    )


def source_ended(pid: int, session: str) -> LostAfterCommit:
    """Somebody has killed the parked process."""
    return LostAfterCommit(
        "the parked process has ended, and with it the memory that had not come over yet",
        where=f"pid {pid}",
        remedy=f"end what is left here with lazyproc abort {session}; where it runs, whoever misses a page waits: see "
        f"lazyproc sessions there, and lazyproc resume {session} with --from or --poison, or lazyproc abort {session}",
    )
