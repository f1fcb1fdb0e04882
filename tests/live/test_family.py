"""Processes of ours that end with those who started them."""

from __future__ import annotations

import os
import signal

from lazyproc.kernel import family


def test_a_parent_that_has_ended_before_is_noticed() -> None:
    """The child says that it ends with its parent when that has gone already: nobody would tell it any more."""
    pids, says = os.pipe()
    gone, holds = os.pipe()

    def parent() -> None:
        us = os.getpid()

        def child() -> None:
            os.close(holds)
            os.read(gone, 1)  # until nobody holds the other end
            family.end_with_parent(us)
            signal.pause()

        os.write(says, str(family.child(child, "child")).encode())

    first = family.child(parent, "parent")
    os.waitpid(first, 0)
    child = int(os.read(pids, 16))
    os.close(holds)
    _, status = os.waitpid(child, 0)  # an orphan is ours: we are a subreaper
    for fd in (pids, says, gone):
        os.close(fd)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
