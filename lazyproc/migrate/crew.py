"""What keeper, guard and pager of a session know of one another; see keeper.py."""

from __future__ import annotations

import os
import pickle
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from lazyproc.events import Event, Listener
from lazyproc.kernel.ready import readable
from lazyproc.kernel.sys import pidfd_open
from lazyproc.migrate.apart import MESSAGE_MAX, Client
from lazyproc.migrate.journal import Journal


class Member:
    """A process of the crew, whoever its parent is."""

    def __init__(self, pid: int, pidfd: int = -1) -> None:
        """`pidfd` when another process of the crew has it open already."""
        self.pid = pid
        self.pidfd = pidfd_open(pid) if pidfd < 0 else pidfd

    def alive(self) -> bool:
        return not readable([self.pidfd], 0)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        self.forget()

    def forget(self) -> None:
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        os.close(self.pidfd)


class Clients:
    """The commands that wait for what becomes of it: the one that began it, and the last that gave a supply."""

    def __init__(self, first: Client) -> None:
        self.first = first
        self._asker: Client | None = None

    def ask(self, asker: Client) -> None:
        if self._asker is not None:
            self._asker.close()
        self._asker = asker

    def tell(self, event: Event) -> None:
        for each in self._all():
            each.tell(event)

    def failed(self, error: BaseException) -> None:
        for each in self._all():
            each.failed(error)

    def done(self, result: object) -> None:
        for each in self._all():
            each.done(result)

    def _all(self) -> list[Client]:
        return [self.first, self._asker] if self._asker else [self.first]


def amend(journal: Journal, facts: dict[str, Any], listener: Listener) -> None:
    """The record, by whoever writes it now; without `facts` nobody has to know of the session any more."""
    journal.reload()
    if not facts:
        journal.remove()
    elif journal.facts:
        state = str(facts.pop("state", journal.facts["state"]))
        journal.note(state, listener, facts, durable="report" in facts)


def say(end: socket.socket, kind: str, value: object) -> None:
    """One message between the keeper and the pager; it waits there for a pager that is still to come."""
    with suppress(OSError):
        end.send(pickle.dumps((kind, value)), socket.MSG_DONTWAIT)


def heard(end: socket.socket, timeout: float = 0, most: int = 64) -> Iterator[tuple[str, Any]]:
    """The messages that are there, or come within `timeout` seconds; not more than `most`."""
    while most and readable([end.fileno()], timeout):
        timeout, most = 0, most - 1
        message: tuple[str, Any] = pickle.loads(end.recv(MESSAGE_MAX))
        yield message
