"""The memory of a tree that CRIU restores here, from `lazyproc serve -D` elsewhere.

Images do not change, and their server has nothing to decide: each link is a session of its own, and a lost one costs
no more than another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from lazyproc.errors import UsageError
from lazyproc.events import Listener
from lazyproc.images.convert import from_images
from lazyproc.images.draft import filled
from lazyproc.images.files import Folder, unpack
from lazyproc.migrate.answering import heard
from lazyproc.migrate.identity import identity, is_same_moment, is_same_tree
from lazyproc.migrate.link import Link, Redial, linked
from lazyproc.migrate.talk import expect
from lazyproc.model import Checkpoint
from lazyproc.pages import PageSource
from lazyproc.pages.bundle import NAME, BundledPages
from lazyproc.pages.peer import Trust
from lazyproc.pages.remote import RemotePages
from lazyproc.pages.session import Session
from lazyproc.pages.storing import without_lazy
from lazyproc.wire.native import Built, Commit, Committed, Images, Party, Prepared, Running

ANSWER_S = 30.0
Identity = Mapping[str, Sequence[int]]


class Offered(NamedTuple):
    """`link` is the caller's to close; `source` reads over it."""

    link: Link
    checkpoint: Checkpoint
    source: PageSource


def offered(target: str, trust: Trust) -> Offered:
    """What is offered at HOST:PORT. Raises what `linked` raises, and UsageError for a process that runs: two of it
    would run when CRIU's restore and the hand-over end differently.
    """
    with ExitStack() as stack:
        link = stack.enter_context(closing(linked(target, Party.DESTINATION, trust, Session.new())))
        if heard(link.control, ANSWER_S).wanted:
            raise UsageError(
                "offers a process that runs, and CRIU restores images",
                where=target,
                remedy="offer a checkpoint of it with lazyproc serve -D, or restore with lazyproc restore --from",
            )
        link.control.send(Prepared({}))
        images = unpack(expect(link.control, Images, ANSWER_S).data)
        source = BundledPages(images.pop(NAME, b""), RemotePages(link.urgent, {}))
        found = Offered(link, from_images(images), source)
        stack.pop_all()
        return found


def demand_same(ours: Identity, theirs: Identity, target: str) -> None:
    """Raises UsageError unless both are of the same checkpoint, as far as can be seen."""
    if not (is_same_tree(ours, theirs) and is_same_moment(ours, theirs)):
        raise UsageError(
            "offers images of another checkpoint", where=target, remedy="name the server of the one in -D"
        )


def fill(directory: Path, checkpoint: Checkpoint, source: PageSource) -> None:
    """The images, with the pages that CRIU wants to have at once. Raises ImageError, and what `source` raises."""
    with filled(Folder(directory), early=True) as draft:
        without_lazy(draft, checkpoint, source)


class Refetch(Redial):
    """A new session with each link, which is past its first words."""

    greeted = True

    def __init__(
        self, target: str, trust: Trust, session: Session, listener: Listener, wanted: Identity
    ) -> None:
        super().__init__(target, trust, session, listener)
        self._wanted = wanted

    def _dial(self) -> Link:
        link, checkpoint, source = offered(self._target, self._trust)
        with ExitStack() as stack:
            stack.enter_context(closing(link))
            demand_same(self._wanted, identity(checkpoint, source), self._target)
            link.control.send(Built())
            expect(link.control, Commit, ANSWER_S)
            link.control.send(Committed())
            link.control.send(Running({}))
            stack.pop_all()
        return link
