"""Fixtures for all tests: two hosts, and nobody leaves a process behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest
from hypothesis import settings

from lazyproc.errors import HostLacks
from lazyproc.hosts import Host, Pair, Trio, ground, pair_of_hosts, trio_of_hosts
from lazyproc.kernel.cgroup import hierarchies, own_name, remove
from lazyproc.restore.groups import places
from tests.needs import lacking

_PR_SET_CHILD_SUBREAPER = 36

# How long an example takes is the machine's affair: no test asserts a time.
settings.register_profile("lazyproc", deadline=None)
settings.load_profile("lazyproc")
_TEARDOWN_S = 60.0
_GRACE_S = 2.0  # for what was killed at the end of a test and is just ending


@contextlib.contextmanager
def _lack_is_reported() -> Iterator[None]:
    try:
        yield
    except HostLacks as error:
        lacking(error.what, error.remedy)


def pytest_configure() -> None:
    """Who is told to end (`timeout` of .ci/run) says what has failed so far, and where it stood."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """A test that has run out of time does not also stand still while it is cleaned up: pytest-timeout fires once."""
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.setitimer(signal.ITIMER_REAL, _TEARDOWN_S)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A source and a destination on this machine."""
    with contextlib.ExitStack() as stack:
        with _lack_is_reported():
            hosts = stack.enter_context(pair_of_hosts())
        yield hosts


@pytest.fixture
def slow_pair() -> Iterator[Pair]:
    """The same, joined by a link of 100 Mbit."""
    with contextlib.ExitStack() as stack:
        with _lack_is_reported():
            hosts = stack.enter_context(pair_of_hosts(rate="100mbit"))
        yield hosts


@pytest.fixture
def trio() -> Iterator[Trio]:
    """A source, a destination and a client that both can reach."""
    with contextlib.ExitStack() as stack:
        with _lack_is_reported():
            hosts = stack.enter_context(trio_of_hosts())
        yield hosts


@pytest.fixture
def host() -> Iterator[Host]:
    """One host of its own."""
    with contextlib.ExitStack() as stack:
        with _lack_is_reported():
            alone = stack.enter_context(Host("alone", stack.enter_context(ground()), 1))
        yield alone


@pytest.fixture(scope="session", autouse=True)
def _orphans_come_to_us() -> None:
    """As a subreaper the test session also sees the children of what it started."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.fixture(scope="session", autouse=True)
def _no_cgroup_is_left() -> Iterator[None]:
    """Groups of trees that have outlived the command that made them: nobody else comes to remove them."""
    before = _tree_groups()
    yield
    remove(sorted(_tree_groups() - before))


def _tree_groups() -> frozenset[str]:
    homes = [os.path.dirname(place.folder) for place in places(hierarchies(), None, own_name(0))]
    return frozenset(folder for home in homes for folder in glob(f"{home}/lazyproc-[0-9]*"))


@pytest.fixture(autouse=True)
def _no_process_is_left(_orphans_come_to_us: None) -> Iterator[None]:
    """Fails a test that leaves a process running, and kills it by its pid."""
    before = _children()
    yield
    until = time.monotonic() + _GRACE_S
    while (left := _reap(_children() - before)) and time.monotonic() < until:
        time.sleep(0.01)
    names = sorted(f"{_command_line(pid)} (pid {pid})" for pid in left)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert not names, f"left running: {', '.join(names)}"


def _children() -> frozenset[int]:
    found: set[int] = set()
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread of ours has just ended
            found.update(map(int, children.read_text().split()))
    return frozenset(found)


def _reap(children: frozenset[int]) -> frozenset[int]:
    """Those that still run, after the dead have been waited for."""
    running = set()
    for pid in children:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                running.add(pid)
    return frozenset(running)


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return "?"
