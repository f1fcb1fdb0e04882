"""A running tree whose memory is still coming: what has to be known to complete it, by whoever does."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from lazyproc.errors import NoSuchProcess
from lazyproc.facts import dataclass
from lazyproc.kernel import proc

ANCHORS = {
    "userfaultfd": "anon_inode:[userfaultfd]",
    "ledger": "/memfd:lazyproc-ledger (deleted)",
    "cradle": "socket:[{}]",
}


@dataclass(frozen=True, slots=True)
class LazyTask:
    """One process that keeps its userfaultfd, the pager's ledger, and the cradle of the children that it forks, in its
    own descriptor table as *anchors*.

    `started` (clock ticks since boot) tells it from a later process with its number.
    """

    vpid: int
    pid: int  # in our pid namespace
    started: int
    userfaultfd: int  # descriptor numbers of its own
    ledger: int
    cradle: int


@dataclass(frozen=True, slots=True)
class LazyTree:
    """`huge` are ranges (pid, address, length in bytes) that had huge pages at the source, `groups` the directories of
    cgroups that were made for it, `cradle` is the inode of that socket.
    """

    root_pid: int
    root_vpid: int
    nursery_pid: int
    tasks: tuple[LazyTask, ...]
    huge: tuple[tuple[int, int, int], ...]
    groups: tuple[str, ...]
    cradle: int


def to_facts(tree: LazyTree) -> dict[str, object]:
    """For a journal."""
    return {
        "root_pid": tree.root_pid,
        "root_vpid": tree.root_vpid,
        "nursery_pid": tree.nursery_pid,
        "tasks": [
            [task.vpid, task.pid, task.started, task.userfaultfd, task.ledger, task.cradle]
            for task in tree.tasks
        ],
        "huge": tree.huge,
        "groups": tree.groups,
        "cradle": tree.cradle,
    }


def from_facts(facts: Mapping[str, Any]) -> LazyTree:
    """What `to_facts` gave. Raises KeyError, TypeError, ValueError for anything else."""
    return LazyTree(
        int(facts["root_pid"]),
        int(facts["root_vpid"]),
        int(facts["nursery_pid"]),
        tuple(LazyTask(*map(int, row)) for row in facts["tasks"]),
        tuple((int(pid), int(addr), int(length)) for pid, addr, length in facts["huge"]),
        tuple(map(str, facts["groups"])),
        int(facts["cradle"]),
    )


def members(tree: LazyTree) -> list[int]:
    """Every process of it that lives, parents before their children. Orphans are the nursery's; without one they are
    known by the cradle.
    """
    living = [task.pid for task in tree.tasks if proc.lives(task.pid, task.started)]
    if tree.nursery_pid:
        return descendants([tree.nursery_pid, *living])
    return descendants([*living, *_with_cradle(tree)])


def _with_cradle(tree: LazyTree) -> Iterator[int]:
    link = ANCHORS["cradle"].format(tree.cradle)
    numbers = {task.cradle for task in tree.tasks if tree.cradle}
    for name in os.listdir("/proc") if numbers else ():
        with suppress(OSError):
            if name.isdecimal() and any(os.readlink(f"/proc/{name}/fd/{fd}") == link for fd in numbers):
                yield int(name)


def anchor_holders(tree: LazyTree, name: str) -> Iterator[tuple[int, int]]:
    """Who has the anchor `name` of LazyTask: (pid, descriptor number there). Children inherit the numbers."""
    link = ANCHORS[name].format(tree.cradle)
    numbers = dict.fromkeys(getattr(task, name) for task in tree.tasks)
    for pid in members(tree):
        for number in numbers:
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{number}") == link:
                    yield pid, number


def descendants(roots: Sequence[int]) -> list[int]:
    """The roots and all below them, parents before their children; those that end meanwhile are of no interest."""
    found = list(dict.fromkeys(roots))
    for parent in found:
        with suppress(NoSuchProcess):
            for tid in proc.task_ids(parent):
                found += [child for child in proc.children_of(parent, tid) if child not in found]
    return found
