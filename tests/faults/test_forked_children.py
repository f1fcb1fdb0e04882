"""What a tree forks while its pages are missing is kept as it is itself: whoever dies, it waits, reads no zeros."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from lazyproc.errors import NoSuchProcess
from lazyproc.hosts import Pair
from tests.faults.helpers import DESTINATION, gone, journal, kill
from tests.faults.lost import ALL_RIGHT, CHILD, FORK, LATE, ROOT, TOUCH_ALL, Lost, incomplete
from tests.faults.test_helpers_killed import waits_for_a_page
from tests.live.bad_luck import ended, started
from tests.live.programs import wait_until

CREW = ("keeper", "pager", "guard")


@pytest.fixture
def tree(pair: Pair) -> Iterator[Lost]:
    with incomplete(pair) as it:
        yield it


@pytest.fixture
def late(tree: Lost) -> Iterator[int]:
    """The pid of a child that is forked now."""
    before = tree.pids()
    tree.order(FORK, LATE)
    (pid,) = set(tree.pids()) - set(before)
    yield pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def commands() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def kill_helpers(tree: Lost) -> None:
    kill(tree.pair.destination, DESTINATION, *CREW)
    wait_until(lambda: tree.info()["state"] == "orphaned", "nobody works on it")


def is_manned(tree: Lost) -> bool:
    """By those whom the record names: right after a resume it names the dead."""
    host, facts = tree.pair.destination, journal(tree.pair.destination, DESTINATION)
    try:
        return not any(gone(host.pid(facts[f"{name}_pid"])) for name in CREW)
    except (KeyError, NoSuchProcess):  # not named yet, or gone altogether
        return False


def resume(tree: Lost, commands: ExitStack) -> None:
    """It ends with the last page, or with those whom it has started."""
    commands.enter_context(ended(started(tree.pair.destination, "resume", tree.session)))
    wait_until(lambda: is_manned(tree), "a whole crew works on it again")


def test_all_helpers_are_killed_and_it_waits(tree: Lost, late: int, commands: ExitStack) -> None:
    kill_helpers(tree)
    tree.order(TOUCH_ALL)
    wait_until(lambda: waits_for_a_page(late), "the child waits for a page")
    resume(tree, commands)
    tree.order(TOUCH_ALL, ROOT, CHILD, LATE)
    assert [tree.found(worker) for worker in (ROOT, CHILD, LATE)] == [ALL_RIGHT] * 3


def test_who_takes_them_back_keeps_them(tree: Lost, late: int, commands: ExitStack) -> None:
    for _ in range(3):
        kill_helpers(tree)
        resume(tree, commands)
    kill_helpers(tree)
    tree.order(TOUCH_ALL)
    wait_until(lambda: waits_for_a_page(late), "the child waits for a page")
    resume(tree, commands)
    tree.order(TOUCH_ALL, ROOT, CHILD, LATE)
    assert tree.found(LATE) == ALL_RIGHT


def test_nobody_else_of_the_tree_is_left(tree: Lost, late: int, commands: ExitStack) -> None:
    kill_helpers(tree)
    os.kill(tree.root, signal.SIGKILL)  # and with it the child of before (PR_SET_PDEATHSIG)
    wait_until(lambda: gone(tree.root), "the root has ended")
    assert not gone(late)
    resume(tree, commands)
    tree.order(TOUCH_ALL, LATE)
    assert tree.found(LATE) == ALL_RIGHT
