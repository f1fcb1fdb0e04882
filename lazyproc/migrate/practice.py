"""What a freeze will run is run once before it, on a child of ours that sleeps.

The first time costs two to three times as much as the next: classes are compiled at their first use
(lazyproc/facts.py), modules are imported, code is specialised, and what a fork has left shared is copied when it is
written to.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

from lazyproc.dump.before import observed_sleeps
from lazyproc.dump.freeze import frozen_tree
from lazyproc.dump.gather import dumped
from lazyproc.dump.park import park_tree, parking, unpark_tree
from lazyproc.dump.source import dump_pages
from lazyproc.errors import LazyprocError
from lazyproc.kernel import family, proc
from lazyproc.migrate.description import description
from lazyproc.migrate.holding import holding_of, to_facts
from lazyproc.steps import Steps

STANDARD = 3  # descriptors; those of the child lead nowhere
SLEEP_MS = 10**6
LOOKS, LOOK_S = 50, 0.0002


def practise(*, connected: bool = False) -> None:
    """Whatever goes wrong here is no reason not to move another process. `connected`: one with a TCP connection."""
    with (
        suppress(LazyprocError, OSError),
        _sleeper(connected) as pid,
        frozen_tree(pid, asleep=observed_sleeps(pid)) as tree,
        dumped(tree) as dump,
        dump_pages(dump) as pages,
    ):
        description(dump.checkpoint, pages, Steps())
        processes = parking(tree)
        to_facts(holding_of(dump, processes))
        park_tree(tree, processes)
        unpark_tree(tree, processes)


@contextmanager
def _sleeper(connected: bool) -> Iterator[int]:
    """A child without any of our connections, but with one to itself when it is to be `connected`; it ends with us."""
    ours, theirs = os.pipe()
    parent = os.getpid()

    def sleep() -> None:
        family.end_with_parent(parent)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(STANDARD):
            os.dup2(null, fd)
        own = _connection() if connected else ()
        faulthandler.enable(STANDARD - 1)  # takes an alternate signal stack, as many runtimes do
        signal.setitimer(signal.ITIMER_VIRTUAL, SLEEP_MS)
        for before, after in pairwise((STANDARD - 1, *sorted(own), os.sysconf("SC_OPEN_MAX"))):
            os.closerange(before + 1, after)
        # Now it is ready.
        while True:
            select.poll().poll(SLEEP_MS)  # a freeze finds most threads in a call with a timeout

    pid = family.child(sleep, "lazyproc-try")
    try:
        os.close(theirs)
        os.read(ours, 1)
        _await_sleep(pid)
        yield pid
    finally:
        os.close(ours)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _await_sleep(pid: int) -> None:
    """What it has said is that it is about to; stopped before, it has no sleep to be described."""
    for _ in range(LOOKS):
        if proc.stat(proc.read(pid, "stat")).state == "S":
            return
        time.sleep(LOOK_S)


def _connection() -> tuple[int, int, int]:
    """Both ends of a TCP connection, and an epoll that watches one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname()).detach()
        theirs = listener.accept()[0].detach()
    watching = os.dup((epoll := select.epoll()).fileno())
    epoll.register(ours)
    return ours, theirs, watching
