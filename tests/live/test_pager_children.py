"""Children that are forked while pages are missing: their userfaultfds lie in the pager's cradle."""

from __future__ import annotations

import fcntl
import os
import resource
import socket

from lazyproc.model import PAGE
from lazyproc.uffd.pager import PagerState, rebind
from tests.live.lazy_rig import DEADLINE, pager, rig

SO_PEEK_OFF = 42
FORKS = 300  # more than are kept before those that are over are taken out


def duplicate(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


def messages(cradle: int) -> int:
    with socket.socket(fileno=duplicate(cradle)) as queue:
        queue.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        count = 0
        while True:
            try:
                queue.recv(4096, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return count
            count += 1


def test_the_living_are_kept_and_the_dead_do_not_pile_up() -> None:
    with rig() as r:
        held = r.server.hold("urgent", r.at(5))
        r.start()
        assert r.child.call("digest", addr=r.at(0), length=PAGE) == r.expect(0, 1)
        waiting = r.child.begin("fork_digest", addr=r.at(5), length=PAGE)
        r.server.wait_for("urgent", r.at(5))
        for _ in range(FORKS):
            assert r.child.call("fork_digest", addr=r.at(0), length=PAGE) == r.expect(0, 1)
        assert 0 < messages(r.pager.cradle) < FORKS / 2
        r.pager.stop()
        mine, ledger, cradle = (duplicate(fd) for fd in (r.pager.spaces()[0], r.pager.ledger, r.pager.cradle))
        for fd in (*r.pager.spaces(), r.pager.cradle):  # as when its descriptor table has gone with it
            os.close(fd)
        rebind(ledger, cradle, (mine,))
        with pager(ledger=ledger) as second:
            second.serve_remote(*r.server.connect())
            held.set()
            second.start(bulk=False)
            assert waiting.result(DEADLINE) == r.expect(5, 1)
            assert r.child.call("fork_digest", addr=r.at(6), length=PAGE) == r.expect(6, 1)
        os.close(ledger)


def test_children_that_have_ended_leave_their_descriptors_to_the_next() -> None:
    """More of them one after the other than there are free descriptors, and no moment of rest between them."""
    free = 20
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with rig() as r:
        r.server.hold("urgent", r.at(5))
        r.start()
        assert r.child.call("digest", addr=r.at(0), length=PAGE) == r.expect(0, 1)
        os.close(lowest := duplicate(r.pager.ledger))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, limits[1]))
        try:
            for _ in range(5 * free):
                assert r.child.call("fork_digest", addr=r.at(0), length=PAGE) == r.expect(0, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert r.pager.state is PagerState.RUNNING
