"""What lazyproc cannot move or end since it would move or end itself with it."""

from __future__ import annotations

import os
from collections.abc import Iterator

from lazyproc.dump.walk import tree_of
from lazyproc.errors import CannotBeDone, Obstacle

OUTSIDE = "start lazyproc outside of the tree"


def demand_apart(pid: int) -> None:
    """Raises CannotBeDone when this very process is in the tree: what does the work is not."""
    if found := tuple(of_the_first(pid)):
        raise CannotBeDone(found)
    if os.getpid() in tree_of(pid):
        raise CannotBeDone((Obstacle(os.getpid(), "process", "is lazyproc itself", OUTSIDE),))


def of_the_first(pid: int) -> Iterator[Obstacle]:
    """Pid 1 as we see it. What outlives a command becomes its child, nobody in its pid namespace can kill it (a signal
    from there is ignored, SIGKILL too), and with it all of them would end.
    """
    if pid == 1:
        yield Obstacle(
            pid, "process", "is the first process here, and all others, lazyproc too, end with it",
            "name the program that is to move (of a service: systemctl show -p MainPID UNIT), and a container from "
            "outside of it, by the number that its first process has there",
        )  # fmt: skip
