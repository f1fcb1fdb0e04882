"""A lazyproc command whose process that comes to a named point of the hand-over first ends there, by SIGKILL.

    python -m tests.faults.killed_at (one|all|disk|stop) POINT python -m lazyproc.cli.main receive ...

With `all` its whole crew ends in the same moment: keeper, guard and pager are one process group. With `disk` nobody
ends, and the disk that holds the journals is full from there on; with `stop` it stops there, until it is continued.

The points are those of docs/protocol.md and of lazyproc/migrate; a process killed there has done all that comes before.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lazyproc.cli.main import main
from lazyproc.migrate.crew import Member
from lazyproc.migrate.drain import Drain
from lazyproc.migrate.journal import Journal, folder
from lazyproc.migrate.keeper import Keeper
from lazyproc.migrate.parking import Standing
from lazyproc.pages.channel import Channel
from lazyproc.restore.locks import TreeLocks
from lazyproc.restore.tree import BuiltTree
from lazyproc.wire.native import Built, Commit, Committed, Drained, Images, Prepared, Released, Running


@functools.cache
def _come() -> mmap.mmap:
    """Shared with all that are forked from us: 1 once somebody has come there."""
    return mmap.mmap(-1, 1)


def _fill_disk() -> None:
    fd = os.open(folder() / "filling", os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):  # ENOSPC
        while True:
            os.write(fd, bytes(4096))
    os.close(fd)


HAPPENS: dict[str, Callable[[], None]] = {
    "one": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "all": lambda: os.kill(0, signal.SIGKILL),
    "disk": _fill_disk,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def _arrive() -> None:
    if not _come()[0]:
        _come()[0] = 1
        HAPPENS[sys.argv[1]]()


def _after(owner: type, name: str, is_it: Callable[..., bool] = lambda *_: True) -> None:
    real: Callable[..., Any] = getattr(owner, name)

    def killed_after(self: Any, *args: Any, **more: Any) -> Any:
        result = real(self, *args, **more)
        if is_it(*args):
            _arrive()
        return result

    setattr(owner, name, killed_after)


def _before(owner: type, name: str, is_it: Callable[..., bool] = lambda *_: True) -> None:
    real: Callable[..., Any] = getattr(owner, name)

    def killed_before(self: Any, *args: Any, **more: Any) -> Any:
        if is_it(*args):
            _arrive()
        return real(self, *args, **more)

    setattr(owner, name, killed_before)


def _again() -> Callable[[], bool]:
    """When it is called for the second time."""
    calls = itertools.count()
    return lambda: next(calls) == 1


def _sent(kind: type) -> Callable[[], None]:
    return lambda: _after(Channel, "send", lambda event: isinstance(event, kind))


def _written(state: str) -> Callable[[], None]:
    return lambda: _after(Journal, "publish", lambda draft: draft.state == state)


DESTINATION: dict[str, Callable[[], None]] = {
    "PREPARED said": _sent(Prepared),
    "BUILT said": _sent(Built),
    "COMMIT read": lambda: _before(TreeLocks, "take_awaited"),
    "COMMIT heard": lambda: _before(Journal, "publish", lambda draft: draft.state == "committed"),
    "committed": _written("committed"),
    "new pager forked": lambda: _before(Keeper, "_note_crew", _again()),
    "new pager on record": lambda: _before(Member, "forget"),
    "outlived": lambda: _after(Keeper, "_note_outlived"),
    "COMMITTED said": _sent(Committed),
    "released": lambda: _after(BuiltTree, "release"),
    "RUNNING said": _sent(Running),
    "whole": lambda: _before(Drain, "_finish"),
    "let go": lambda: _after(Drain, "_finish"),
    "drained": _written("drained"),
    "DRAINED said": _sent(Drained),
}
SOURCE: dict[str, Callable[[], None]] = {
    "IMAGES said": _sent(Images),
    "parked": _written("parked"),
    "locks let go": lambda: _after(Standing, "let_go_of_locks"),
    "COMMIT said": _sent(Commit),
    "COMMITTED heard": _written("committed"),
    "RUNNING heard": _written("running"),
    "RELEASED said": _sent(Released),
    "record removed": lambda: _after(Journal, "remove"),
}
POINTS = {**DESTINATION, **SOURCE}


def killed_at(point: str, whom: str = "one") -> tuple[str, ...]:
    """What a command is run by, so that it ends there."""
    return (sys.executable, "-m", "tests.faults.killed_at", whom, point)


if __name__ == "__main__":
    _come()
    POINTS[sys.argv[2]]()
    sys.exit(main(sys.argv[sys.argv.index("lazyproc.cli.main") + 1 :]))
