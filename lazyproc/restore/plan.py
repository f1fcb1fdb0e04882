"""From the model to the order in which processes are made: pure, printable, and refusing what cannot be made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from lazyproc.errors import RestoreError
from lazyproc.facts import dataclass
from lazyproc.model import Task, TaskState


@dataclass(frozen=True, slots=True)
class Fork:
    """Fork `vpid` from `parent` (0: from the nursery)."""

    vpid: int
    parent: int


@dataclass(frozen=True, slots=True)
class NewSession:
    vpid: int


@dataclass(frozen=True, slots=True)
class JoinGroup:
    """setpgid(2); a group whose number is the process's own is founded by it."""

    vpid: int
    pgid: int


@dataclass(frozen=True, slots=True)
class Exit:
    """The process becomes a zombie with this wait status."""

    vpid: int
    status: int


@dataclass(frozen=True, slots=True)
class StandIn:
    """A child of `member` founds the group of a leader that is gone; `vpid` is its number, and the group's."""

    vpid: int
    member: int


@dataclass(frozen=True, slots=True)
class Dismiss:
    """The stand-in ends, and `member` takes its status."""

    vpid: int
    member: int


Step = Fork | NewSession | JoinGroup | Exit | StandIn | Dismiss


def creation_steps(tasks: Sequence[Task]) -> tuple[Step, ...]:
    """Every process of the tree in its session and process group.

    A child has the session its parent had at the fork, so children of an earlier session are forked before the
    parent's setsid. Sessions and groups that begin outside the tree become the nursery's.
    """
    children: dict[int, list[Task]] = defaultdict(list)
    for task in tasks[1:]:
        children[task.ppid].append(task)
    steps = tuple(_create(tasks[0], 0, _outside(tasks), children))
    return (
        steps
        + tuple(_groups(tasks))
        + tuple(Exit(task.vpid, task.exit_code) for task in tasks if task.state is TaskState.ZOMBIE)
    )


def _outside(tasks: Sequence[Task]) -> int:
    """The session that comes from outside the tree: the root's, unless the tree has its leader."""
    return 0 if tasks[0].sid in {task.vpid for task in tasks} else tasks[0].sid


def _create(task: Task, parent: int, inherited: int, children: dict[int, list[Task]]) -> Iterator[Step]:
    """`inherited` is the session the process is born into (0: the nursery's)."""
    yield Fork(task.vpid, parent)
    leads = task.sid == task.vpid
    if not leads and inherited not in (task.sid, 0):
        raise RestoreError(
            f"its session {task.sid} can neither be inherited nor founded by it",
            where=f"pid {task.vpid}",
            remedy="the session's leader has to be in the tree",
        )
    later = []
    for child in children[task.vpid]:
        if leads and child.sid not in (task.sid, child.vpid):
            yield from _create(child, task.vpid, inherited, children)
        else:
            later.append(child)
    if leads:
        yield NewSession(task.vpid)
    for child in later:
        yield from _create(child, task.vpid, task.sid, children)


def _groups(tasks: Sequence[Task]) -> Iterator[Step]:
    """Groups are founded before others join them; session leaders have theirs already."""
    members = [task for task in tasks if task.pgid and task.sid != task.vpid]
    yield from (JoinGroup(task.vpid, task.pgid) for task in members if task.pgid == task.vpid)
    stand_ins = []
    founded = {task.vpid for task in tasks if task.pgid == task.vpid or task.sid == task.vpid}
    for task in members:
        # A group of the root's that is not founded in the tree comes from outside.
        if task.pgid not in (*founded, tasks[0].pgid):
            founded.add(task.pgid)
            stand_ins.append(Dismiss(task.pgid, task.vpid))
            yield from (StandIn(task.pgid, task.vpid), JoinGroup(task.pgid, task.pgid))
        if task.pgid != task.vpid and task.pgid in founded:
            yield JoinGroup(task.vpid, task.pgid)
    yield from stand_ins
