"""How a keeper of a destination's session is started, and asked for what it has not been started for."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Protocol

from lazyproc.errors import LazyprocError, UsageError
from lazyproc.events import Listener, Note
from lazyproc.kernel import family
from lazyproc.kernel.fds import AMPLE, make_room
from lazyproc.migrate.anchors import anchors
from lazyproc.migrate.apart import Client, Messages, result, stream, unplug
from lazyproc.migrate.arrival import Terms
from lazyproc.migrate.desk import ask
from lazyproc.migrate.journal import DESTINATION, Journal, Record
from lazyproc.migrate.keeper import NAME, Keeper
from lazyproc.migrate.link import Link
from lazyproc.migrate.paging import Preferences
from lazyproc.migrate.place import Place
from lazyproc.migrate.supply import Supply
from lazyproc.pages.session import Session
from lazyproc.restore.lazy import drop_anchors
from lazyproc.restore.lazytree import LazyTree, anchor_holders, from_facts
from lazyproc.uffd.pager import rebind


class Closable(Protocol):
    def close(self) -> None: ...


def keep(
    link: Link, terms: Terms, preferences: Preferences, place: Place, not_ours: Sequence[Closable]
) -> Messages:
    """Start the keeper of a session whose connections stand; what it tells. `not_ours` are closed in it.

    For the caller the link is over.
    """
    ours, theirs = stream()

    def run() -> None:
        ours.close()
        for each in not_ours:
            each.close()
        outputs = (os.dup(1), os.dup(2)) if terms.command else ()  # QEMU says there what is wrong
        unplug()
        facts = {"token": link.session.token, "peer": link.control.peer, **place.facts()}
        journal = Journal(link.session.id, DESTINATION, facts)
        Keeper(link.session, journal, place, Client(theirs), preferences).take_in(link, terms, outputs)

    with theirs:
        family.daemon(run, NAME)
    return Messages(ours)


def keep_on(record: Record, supply: Supply, listener: Listener) -> Mapping[str, object]:
    """A new keeper for a tree whose helpers are all gone; the report when it is complete. See `sessions.resume`.

    `supply` in place of the source, if it is any. Raises LostAfterCommit when the tree is gone, too; Parked when the
    keeper is gone.
    """
    tree = from_facts(record.facts["tree"])
    if "whole" in record.facts and not any(anchor_holders(tree, "ledger")):
        return _put_away(record, tree, listener)
    facts = {**record.facts}
    if facts.pop("monitor", None) is not None and not facts.get("told"):
        listener(
            Note(
                f"pid {tree.root_pid}: all were killed before the guest was let run; see `cont` in its monitor"
            )
        )
    ours, theirs = stream()

    def run() -> None:
        ours.close()
        unplug()
        make_room(AMPLE)
        client = Client(theirs)
        try:
            kept = anchors(tree)
            facts.update(ledger=kept.ledger, connections=[], supply=supply.facts())
            journal = Journal(record.session, DESTINATION, facts)
            session = Session(record.session, str(record.facts["token"]))
            keeper = Keeper(session, journal, Place.of(record.facts), client, Preferences())
            # Whoever else resumes it has found the desk taken, and what is shared is ours to change.
            rebind(kept.ledger, kept.cradle, kept.userfaultfds)
            journal.write(record.state, durable=False)
        except (LazyprocError, OSError) as error:
            client.failed(error)
            return
        keeper.go_on()

    with ours:
        with theirs:
            family.daemon(run, NAME)
        return _awaited(ours, record, listener)


def _put_away(record: Record, tree: LazyTree, listener: Listener) -> Mapping[str, object]:
    """All who worked on it were killed while the tree gave back what it kept: every page is there."""
    drop_anchors(tree)
    journal = Journal(record.session, DESTINATION, record.facts)
    report: Mapping[str, object] = record.facts["whole"]
    if Place.of(record.facts).address:
        journal.note("drained", listener, {"report": report}, durable=True)  # the source will ask
    else:
        journal.remove()
    return report


def supply_to(record: Record, supply: Supply, listener: Listener) -> Mapping[str, object]:
    """The keeper of a session goes on with `supply` in place of the source; the report when its memory is complete.

    Raises UsageError when there is none any more, Parked when `supply` lacks pages.
    """
    ours, theirs = stream()
    with ours:
        with theirs:
            answer = ask(record.session, DESTINATION, {"do": "supply", **supply.facts()}, theirs.fileno())
        if answer is None or "error" in answer:
            raise UsageError("its keeper does not answer", where=record.session, remedy="try again")
        return _awaited(ours, record, listener)


def _awaited(stream: socket.socket, record: Record, listener: Listener) -> Mapping[str, object]:
    lost = f"see lazyproc sessions, and lazyproc resume {record.session}"
    report: Mapping[str, object] = result(stream, listener, lost=lost)
    return report
