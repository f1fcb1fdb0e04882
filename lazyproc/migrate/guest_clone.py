"""`qemu-serve` with several targets: a saved guest goes on in each of them, as a guest of its own.

One process for all, with a thread for each: processes would start while the first of their guests wait for pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path

from lazyproc.errors import ConnectionLost, LazyprocError
from lazyproc.events import Listener, ignore
from lazyproc.migrate.guest_serve import GuestServed, Talk, opened, recoverable_from, talks_with
from lazyproc.pages.peer import Trust
from lazyproc.pages.tls import Tls
from lazyproc.qemu.postcopy import PagesLeft


def qemu_clone(
    directory: Path | str,
    targets: Sequence[str],
    *,
    preempt: bool = False,
    insecure: bool = False,
    tls: Tls | None = None,
    listener: Listener = ignore,
) -> tuple[GuestServed, ...]:
    """The guest in the folder `directory`, for each QEMU that waits at one of the `targets`, as lazyproc.qemu_serve has
    them; returns when all have every page. `listener` hears of the first.

    None is told to run before all have said that they take the guest in; after that each goes on for itself. Raises
    UsageError, ImageError, ConnectionLost, ProtocolError; Parked with all that were lost, when the others are done.
    """
    trust = Trust(insecure, tls=tls)
    with ExitStack() as stack:
        found, pages = stack.enter_context(opened(Path(directory)))
        talks = stack.enter_context(talks_with(targets, trust, preempt))
        for talk in talks:
            talk.begin(found.machine, found.blocks)
        extents = pages.extents()
        left = [PagesLeft(found.blocks, extents, pages) for _ in talks]
        for each in left:
            each.alike(left)
        with recoverable_from(Path(directory)):
            return _served(talks, left, found.devices, listener)


def _served(
    talks: Sequence[Talk], left: Sequence[PagesLeft], devices: bytes, listener: Listener
) -> tuple[GuestServed, ...]:
    def serve(talk: Talk, pages: PagesLeft) -> GuestServed:
        talk.run(devices)
        return talk.serve(pages, listener if talk is talks[0] else ignore)

    with ThreadPoolExecutor(len(talks)) as pool:
        serving = [pool.submit(serve, talk, pages) for talk, pages in zip(talks, left, strict=True)]
        try:
            wait(serving)
        except BaseException:  # an interrupt: the pool waits for its threads
            for talk in talks:
                talk.hang_up()
            raise
    lost = {talk: error for talk, each in zip(talks, serving, strict=True) if (error := each.exception())}
    if len(lost) > 1 and all(isinstance(error, (LazyprocError, OSError)) for error in lost.values()):
        raise ConnectionLost(" and ".join(_named(talk, error) for talk, error in lost.items()))
    return tuple(each.result() for each in serving)


def _named(talk: Talk, error: BaseException) -> str:
    text = str(error)
    return text if talk.target in text else f"{talk.target}: {text}"
