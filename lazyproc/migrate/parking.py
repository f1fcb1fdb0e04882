"""A described tree is parked, and what becomes of it when its hand-over fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lazyproc.dump.freeze import FrozenTree
from lazyproc.dump.gather import Dump
from lazyproc.dump.park import park_tree, parking, unpark_tree
from lazyproc.facts import dataclass
from lazyproc.kernel.netfilter import Hold
from lazyproc.migrate.holding import Holding, holding_of, to_facts
from lazyproc.migrate.journal import Journal
from lazyproc.migrate.locks import LockTaken, let_go, still_parked, take_again
from lazyproc.migrate.talk import Refused
from lazyproc.steps import Steps


@dataclass(slots=True)
class Standing:
    """A parked tree, and how far its hand-over has come."""

    held: Holding
    unlocked: bool = False  # file locks of it may be anybody's
    committing: bool = False  # it may run elsewhere

    def let_go_of_locks(self) -> None:
        self.unlocked = True
        let_go(self.held.processes, self.held.locks)


@contextmanager
def parked_tree(
    tree: FrozenTree, dump: Dump, hold: Hold | None, journal: Journal, frozen_at: float, steps: Steps
) -> Iterator[Standing]:
    """Inside, no thread of the tree runs on, whatever becomes of us. It goes on here after an error before it is
    `committing`, and when the other side says no; after any other error it stays, since it may run there. So it does
    when one of its file locks is somebody else's by now: that raises Parked.
    """
    processes = parking(tree)
    held = holding_of(dump, processes)
    # For whoever comes after us. Not yet for a host without power: the tree goes with it, whatever the disk has.
    facts = {"held": to_facts(held), "root_vpid": dump.checkpoint.root.vpid, "frozen_at": frozen_at}
    journal.write("parked", durable=False, **facts)
    steps.done("journal")
    standing = Standing(held)
    try:
        park_tree(tree, processes)
        if hold is not None:
            hold.keep()
        yield standing
    except BaseException as error:
        if standing.committing and not isinstance(error, Refused):
            if hold is not None:
                hold.forget()
            raise
        if standing.unlocked:
            _lock_again(standing, hold, journal, error)
        unpark_tree(tree, processes)
        journal.remove()
        raise


def _lock_again(standing: Standing, hold: Hold | None, journal: Journal, why: BaseException) -> None:
    """Raises Parked when one of its locks is not to be had: without it the tree must not run."""
    try:
        take_again(standing.held.processes, standing.held.locks, traced=True)
    except LockTaken as taken:
        if hold is not None:
            hold.forget()
        journal.call_off(str(why))
        raise still_parked(taken, journal.session) from why
