"""What a tree does at every moment of a freeze. Between any two looks at it, and between any two calls that stop it, it
does one thing, and is through with that before the freeze goes on."""

from __future__ import annotations

import fcntl
import os
import termios
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lazyproc.dump.freeze import FrozenTree, frozen_tree
from lazyproc.dump.walk import thread_ids, tree_of
from lazyproc.errors import NoSuchProcess
from lazyproc.kernel import proc
from lazyproc.kernel.tracee import Tracee
from tests.live.programs import wait_until
from tests.live.tracees import tracee

SEAMS = (
    *((proc, name) for name in ("task_ids", "children_of", "stat")),
    *((Tracee, name) for name in ("seize", "interrupt", "wait_stop", "is_stopped")),
)

# Another thread, or with "child" a child, does as v[3] says when it gets a byte; it is named by the first line.
ACTOR = r"""
static void *stay(void *a) { for (;;) pause(); return a; }

static void act(const char *what)
{
    pthread_t t;
    pid_t child;

    if (!strcmp(what, "exec"))
        execv("/proc/thread-self/exe", (char *[]){ words[0], words[1], 0 });
    if (!strcmp(what, "clone") && pthread_create(&t, 0, stay, 0))
        _exit(1);
    if (!strcmp(what, "fork") || !strcmp(what, "fork and end")) {
        child = fork();
        if (child == 0) stay(0);
    }
    if (strcmp(what, "clone") && strcmp(what, "fork"))
        return;
    stay(0);
}

static int orders;
static void *actor(void *a)
{
    char byte;
    if (read(orders, &byte, 1) != 1) _exit(1);
    act(a);
    return a;
}

int main(int c, char **v)
{
    pthread_t t;
    words = v;
    if (c == 2) stay(0);
    orders = open(v[2], O_RDWR);
    if (!strncmp(v[4], "child", 5)) {
        pid_t child;
        if (!strcmp(v[4], "child of nobody")) signal(SIGCHLD, SIG_IGN);
        prctl(PR_SET_CHILD_SUBREAPER, 1);
        child = fork();
        if (child == 0) { actor(v[3]); _exit(0); }
        say("%ld\n", child, 0, 0);
        stay(0);
    }
    if (!strcmp(v[4], "thread of a child") && fork()) stay(0);
    if (pthread_create(&t, 0, stay, 0) || pthread_create(&t, 0, actor, v[3])) _exit(1);
    say("%ld\n", 0, 0, 0);
    if (!strcmp(v[4], "of a dead leader")) pthread_exit(0);
    stay(0);
}
"""


@dataclass
class Moment:
    """Something happens after so many calls of the freeze."""

    left: int
    happen: Callable[[], None]

    def between(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for where, name in SEAMS:
            monkeypatch.setattr(where, name, self._before(getattr(where, name)))

    def _before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            result = call(*args, **options)
            self.left -= 1
            if self.left == 0:
                self.happen()
            return result

        return wrapped


@dataclass(frozen=True)
class Order:
    """To the actor of a tree, over a FIFO that we hold open."""

    root: int
    fifo: int

    def give(self) -> None:
        """Returns when it has been carried out, or cannot be before the tree is let go."""
        os.write(self.fifo, b"\n")
        wait_until(self._is_through, "it has acted, or is stopped")

    def _is_through(self) -> bool:
        states = "".join(state for pid in tree_of(self.root) for state in thread_states(pid).values())
        return "R" not in states and (self._is_read() or "t" in states)

    def _is_read(self) -> bool:
        ahead = bytearray(4)
        fcntl.ioctl(self.fifo, termios.FIONREAD, ahead)
        return not any(ahead)


def thread_states(pid: int) -> dict[int, str]:
    states = {}
    for tid in thread_ids(pid):
        with suppress(NoSuchProcess):
            states[tid] = proc.stat(proc.read(pid, f"task/{tid}/stat")).state
    return states


def assert_whole(tree: FrozenTree, root: int, moment: int) -> None:
    assert root in tree.tasks
    alive = {task.pid: {each.tid for each in task.threads} for task in tree.tasks.values() if not task.zombie}
    states = {pid: thread_states(pid) for pid in tree_of(root)}
    living = {
        pid: {tid for tid, state in threads.items() if state not in "ZX"} for pid, threads in states.items()
    }
    assert alive == {pid: tids for pid, tids in living.items() if tids}, f"moment {moment}"
    assert {states[pid][tid] for pid, tids in alive.items() for tid in tids} == {"t"}, f"moment {moment}"
    for pid in alive:
        task = tree.tasks[pid]
        assert task.threads[0].tid == pid, f"moment {moment}"
        assert task.stat.arg_start == proc.stat(proc.read(pid, "stat")).arg_start, f"moment {moment}"


def frozen_when(number: int, act: str, who: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A freeze while that happens at this moment; False when it has no such moment."""
    directory.mkdir()
    os.mkfifo(directory / "orders")
    fifo = os.open(directory / "orders", os.O_RDWR)
    try:
        with (
            tracee(ACTOR, directory, str(directory / "orders"), act, who) as it,
            monkeypatch.context() as patch,
        ):
            moment = Moment(number, Order(it.pid, fifo).give)
            moment.between(patch)
            with frozen_tree(it.pid) as tree:
                reached = moment.left <= 0
                assert_whole(tree, it.pid, number)
                tree.kill()
            return reached
    finally:
        os.close(fifo)


@pytest.mark.parametrize(
    ("act", "who"),
    [
        ("end", "thread"),
        ("clone", "thread"),
        ("fork", "thread"),
        ("exec", "thread"),
        ("end", "child"),
        ("end", "child of nobody"),
        ("fork and end", "child"),
        ("fork and end", "child of nobody"),
        ("exec", "child"),
        ("clone", "thread of a child"),
        ("exec", "thread of a child"),
    ],
)
def test_a_tree_that_changes_at_any_moment(
    act: str, who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = 1
    while frozen_when(reached, act, who, tmp_path / str(reached), monkeypatch):
        reached += 1
    assert reached > 5


@pytest.mark.parametrize("number", [1, 2, 3, 5, 8])
def test_a_dead_leader_whose_number_another_thread_takes(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the moment of an exec it looks like one that has ended for good."""
    assert frozen_when(number, "exec", "of a dead leader", tmp_path / "it", monkeypatch)


def test_a_tree_that_is_deep(tmp_path: Path) -> None:
    """Of more generations than there are rounds."""
    source = """
    int main(int c, char **v)
    {
        (void)c;
        words = v;
        for (int i = 0; i < 100; i++) {
            pid_t child = fork();
            if (child) break;
            if (i == 99) say("ready\\n", 0, 0, 0);
        }
        for (;;) pause();
    }
    """
    with tracee(source, tmp_path) as it, frozen_tree(it.pid) as tree:
        assert len(tree.tasks) == 101
        tree.kill()
