"""A connection that goes on with a session: handed to the keeper, or answered from the journal when he has gone."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lazyproc.errors import ConnectionLost, ProtocolError, UsageError
from lazyproc.kernel import family
from lazyproc.migrate.desk import ask, is_staffed
from lazyproc.migrate.journal import DESTINATION, ENDED, Journal, Record, find
from lazyproc.migrate.link import NOT_KNOWN
from lazyproc.migrate.talk import expect
from lazyproc.pages.channel import Channel
from lazyproc.pages.remote import Maps
from lazyproc.wire.native import Abort, Committed, Drained, Hello, Map, Released, Role, Running

SAY_S = 30.0


def hand_on(channel: Channel, hello: Hello) -> None:
    """The connection is over for the caller. Raises ConnectionLost, ProtocolError."""
    with channel:
        names = {"role": hello.role.value, "session": hello.session, "token": hello.token}
        fields = {"do": "connect", **names, "revision": hello.revision}
        if ask(hello.session, DESTINATION, fields, channel.fileno()) is not None:
            return
        staffed = is_staffed(hello.session, DESTINATION)  # who leaves has written down why before
        record = _record(hello)
        unborn = record is not None and record.unborn
        if staffed and (record is None or unborn):
            channel.refuse("it is not settled yet whether it runs here", again=True)
        elif record is None:
            channel.refuse(NOT_KNOWN)
        elif record.rebooted and record.state not in ENDED:
            channel.refuse("it has ended there with its host, which was started again since")
        elif record.state not in ENDED and not unborn:
            channel.refuse(f"it is orphaned here: lazyproc resume {hello.session} on this host", again=True)
        else:
            channel.welcome()
            if hello.role is Role.CONTROL:
                family.daemon(lambda: _tell(channel, record), "lazyproc-tell")


def _record(hello: Hello) -> Record | None:
    """Of the session, when the caller has its secret."""
    with suppress(UsageError):
        record = find(hello.session, DESTINATION)
        token = str(record.facts.get("token", ""))
        if token and secrets.compare_digest(token.encode(), hello.token.encode()):
            return record
    return None


def _tell(channel: Channel, record: Record) -> None:
    """How it has ended here. What is known is kept until the source has said that it knows; to ABORT it says nothing,
    so that is kept (journal.forget_old).
    """
    family.keep_only(channel.fileno())  # neither a door nor a desk is to live on in us
    with suppress(ConnectionLost, ProtocolError):
        if record.state == "aborted" or record.unborn:  # nobody is left who could commit it
            reason = record.facts.get("reason", "all who built the tree there were killed before it ran")
            channel.send(Abort({"reason": str(reason)}))
        else:
            _tell_drained(channel, record.facts)
            Journal(record.session, DESTINATION).remove()


def _tell_drained(channel: Channel, facts: Mapping[str, Any]) -> None:
    channel.send(Committed())
    channel.send(Running({"root_pid": facts["tree"]["root_pid"]}))
    maps = Maps(channel.peer_revision)
    while not maps.hear(expect(channel, Map, SAY_S)):
        continue
    channel.send(Drained(facts["report"]))
    expect(channel, Released, SAY_S)
