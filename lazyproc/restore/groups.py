"""In which cgroups a restored tree lives (docs/adr/0008-cgroups.md)."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lazyproc.errors import RestoreError, UsageError
from lazyproc.events import Listener, Note
from lazyproc.facts import dataclass
from lazyproc.kernel import cgroup
from lazyproc.kernel.cgroup import SYSTEMD, V2, Hierarchy, Place
from lazyproc.kernel.nursery import Nursery, nursery
from lazyproc.restore.creation import pid_taken
from lazyproc.restore.inherited import Inherited

UNITS = (".service", ".scope")  # who stops one kills all that is in its group and below
BELOW = "/sys/fs/cgroup"
AMENDS = (
    "have a cgroup2 hierarchy mounted writable (mount -t cgroup2 none /sys/fs/cgroup), run as root, "
    "or name a group with --cgroup"
)
_NAME_MAX = 255  # bytes
_REFUSALS = {
    errno.EBUSY: "it gives controllers to groups below it, so only those have processes",
    errno.EOPNOTSUPP: "it is threaded, or below a threaded one",
    errno.ENOSPC: "it has no processors or no memory nodes (cpuset)",
    errno.EAGAIN: "a limit is reached (pids.max, cgroup.max.descendants, cgroup.max.depth)",
    errno.ENODEV: "it has been removed",
}


def outside(hierarchy: Hierarchy) -> str:
    """The group above the unit that our own lies in, without a unit the one above ours; as far up as is to be seen."""
    names = hierarchy.own.strip("/").split("/")
    units = [depth for depth, name in enumerate(names) if name.endswith(UNITS)]
    above = "/" + "/".join(names[: units[-1] if units else len(names) - 1])
    return above if hierarchy.shows(above) else hierarchy.root


def places(hierarchies: Sequence[Hierarchy], named: str | None, name: str) -> tuple[Place, ...]:
    """The groups of a tree: `named` by the user, or a new one called `name`. In all other hierarchies it is in ours.

    Units are left behind where systemd keeps them: in v2, or in its own of v1. The controllers of v1 have limits
    only, which are not ours to leave: there a tree is in the group that was named, if it exists. Pure.
    """
    found = []
    for each in hierarchies:
        made = each.controllers == V2 or (each.controllers == SYSTEMD and each.own != "/")
        if named is not None and each.shows(named):
            found.append(Place(each, named, made))
        elif named is None and made:
            found.append(Place(each, os.path.join(outside(each), name), made))
    return tuple(found)


def demand_path(path: str) -> str:
    """`path` as /proc/PID/cgroup has it. Raises UsageError."""
    names = [name for name in path.split("/") if name]
    wrong = any(name in (".", "..") or len(os.fsencode(name)) > _NAME_MAX for name in names)
    if not path or wrong or "\0" in path or "\n" in path or f"/{'/'.join(names)}".startswith(BELOW):
        raise UsageError(
            "is no path of a cgroup",
            where=f"cgroup {path!r}",
            remedy="write it as /proc/PID/cgroup does, from the root of the hierarchy: /a/b",
        )
    return "/" + "/".join(names)


def whereabouts(named: str | None) -> Mapping[str, str]:
    """Where a tree would be, by controllers. Raises RestoreError and UsageError for a group that was named."""
    own = {each.controllers: each.own for each in cgroup.hierarchies()}
    try:
        return own | {place.hierarchy.controllers: place.path for place in tried(named)}
    except cgroup.NotJoined:
        return own


def tried(named: str | None) -> Sequence[Place]:
    """The groups of a tree, after a child of ours has been in them; nothing of it stays. Raises as `_ready`."""
    from lazyproc.kernel.host import join_group

    with _ready(named, 0) as there:
        for place in there:
            try:
                join_group(place.folder)
            except OSError as error:
                refusal = cgroup.NotJoined(error.errno, error.strerror)
                raise refusal if named is None else _refused(place.path, refusal) from error
        return there


@dataclass(frozen=True, slots=True)
class Birth:
    """A nursery in the groups of its tree, and the directories of those that were made because none was named."""

    nursery: Nursery
    groups: Sequence[str]
    inherited: Inherited


@contextmanager
def nursery_in_group(
    named: str | None, label: int, listener: Listener, *, pidns: bool, sibling: int = 0
) -> Iterator[Birth]:
    """The nursery of a tree, stopped; with the number `sibling` as its root, a child of our parent.

    `label` is a part of their names. Where none can be made the tree is in our own groups, and `listener` is told.
    Raises RestoreError for a group that was named, UsageError, PidTaken for `sibling`, HostLacks.
    """
    with ExitStack() as stack:
        there: Sequence[Place] = ()
        try:
            there = stack.enter_context(_ready(named, label))
            birth = stack.enter_context(nursery(pidns=pidns, groups=there, sibling=sibling))
        except FileExistsError as error:
            raise pid_taken(sibling) from error
        except cgroup.NotJoined as error:
            there = ()
            _left_in_ours(named, error, listener)
            birth = stack.enter_context(nursery(pidns=pidns, sibling=sibling))
        yield Birth(birth, [place.folder for place in there if named is None], Inherited.of(birth))


@contextmanager
def joined(pid: int, named: str | None, listener: Listener) -> Iterator[Sequence[str]]:
    """A process that somebody else has started is put into the groups of a tree; the directories of those that were
    made, which go at the end unless it lives there. Raises as `nursery_in_group`.
    """
    with ExitStack() as stack:
        there: Sequence[Place] = ()
        try:
            there = stack.enter_context(_ready(named, pid))
            for place in there:
                _put(pid, place.folder)
        except cgroup.NotJoined as error:
            there = ()
            _left_in_ours(named, error, listener)
        yield [place.folder for place in there if named is None]


def _put(pid: int, folder: str) -> None:
    try:
        Path(folder, "cgroup.procs").write_text(str(pid))
    except OSError as error:
        raise cgroup.NotJoined(error.errno, error.strerror) from error


def _left_in_ours(named: str | None, error: cgroup.NotJoined, listener: Listener) -> None:
    """Raises RestoreError for a group that was named."""
    if named is not None:
        raise _refused(named, error) from error
    listener(
        Note(f"the tree is in the cgroup of this command and may end with it ({error.strerror}): {AMENDS}")
    )


@contextmanager
def _ready(named: str | None, label: int) -> Iterator[Sequence[Place]]:
    """The groups of a tree. Raises NotJoined, or RestoreError and UsageError for the one that was named."""
    path = None if named is None else demand_path(named)
    wanted = places(cgroup.hierarchies(), path, cgroup.own_name(label))
    with ExitStack() as stack:
        try:
            there = stack.enter_context(cgroup.ready(wanted))
            if not there:
                raise cgroup.NotJoined(0, "no hierarchy that is mounted here has it")
        except cgroup.NotJoined as error:
            if path is None:
                raise
            raise _refused(path, error) from error
        for place in there if path is None else ():
            cgroup.sweep(os.path.dirname(place.folder))
        yield there


def _refused(path: str, error: cgroup.NotJoined) -> RestoreError:
    """Before anything is built."""
    return RestoreError(
        f"the tree cannot be put into it ({_REFUSALS.get(error.errno or 0, error.strerror)})",
        where=f"cgroup {path}",
        remedy="name another with --cgroup, or leave --cgroup out for one of its own",
    )
