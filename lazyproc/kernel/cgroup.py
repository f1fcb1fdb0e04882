"""Cgroups: the hierarchies that are mounted here, and groups in them (cgroups(7), admin-guide/cgroup-v2.rst).

The path of a group is that of /proc/PID/cgroup: "/" is the root of the hierarchy, or of our cgroup namespace.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from lazyproc.facts import dataclass
from lazyproc.kernel import proc

V2 = ""  # what /proc/PID/cgroup has in place of controllers
SYSTEMD = "name=systemd"  # where a systemd that does not use v2 keeps its units
GRACE_S = 10  # an empty group of this age is not waiting for its first process
_OWN = "lazyproc-"


def own_name(label: int) -> str:
    """The name of a new group for a tree; `sweep` knows it again."""
    return f"{_OWN}{label}-{os.urandom(4).hex()}"


class NotJoined(OSError):
    """A process could not be born in its groups."""


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted hierarchy. `root` is the group that is seen at `point`, `own` is ours."""

    controllers: str  # as in /proc/PID/cgroup, separated by commas; V2
    point: str
    root: str
    own: str

    def shows(self, path: str) -> bool:
        """Whether the directory of a group, if there is one, is below `point`; what is above our namespace is not."""
        if path.startswith("/.."):
            return False
        return path == self.root or path.startswith(self.root.rstrip("/") + "/")

    def folder(self, path: str) -> str:
        """The directory of a group that is shown."""
        return (self.point + path[len(self.root.rstrip("/")) :]).rstrip("/")


@dataclass(frozen=True, slots=True)
class Place:
    """A group where the processes of a tree will be. One that need not be there is joined when it is."""

    hierarchy: Hierarchy
    path: str
    made: bool

    @property
    def folder(self) -> str:
        return self.hierarchy.folder(self.path)


def hierarchies() -> tuple[Hierarchy, ...]:
    """Those mounted here, each once. A mount whose root lies above our cgroup namespace is passed over."""
    own = proc.cgroup(proc.read(os.getpid(), "cgroup"))
    lines = proc.read(os.getpid(), "mountinfo").split(b"\n")
    return _found(proc.mountinfo(b"\n".join(line for line in lines if b" - cgroup" in line)), own)


def _found(mounts: Sequence[proc.Mount], own: Mapping[str, str]) -> tuple[Hierarchy, ...]:
    """The options of a v1 mount have its controllers, as /proc/PID/cgroup has them, among flags."""
    words = {each: set(each.split(",")) for each in own if each != V2}
    found: dict[str, Hierarchy] = {}
    for mount in mounts:
        if mount.root.startswith("/.."):
            continue
        if mount.kind == "cgroup2":
            named = [V2] if V2 in own else []
        else:
            named = [each for each, names in words.items() if names.issubset(mount.options)]
        for each in named:
            found.setdefault(each, Hierarchy(each, mount.point, mount.root, own[each]))
    return tuple(found.values())


@contextmanager
def ready(places: Sequence[Place]) -> Iterator[tuple[Place, ...]]:
    """The places that are there, after making what has to be. Raises NotJoined.

    On leaving what was made is removed, unless somebody lives in it.
    """
    made: list[str] = []
    try:
        yield _prepared(places, made)
    finally:
        remove(made)


def _prepared(places: Sequence[Place], made: list[str]) -> tuple[Place, ...]:
    try:
        for place in places:
            if place.made:
                _make(place, made)
        there = tuple(place for place in places if os.path.isdir(place.folder))
        for place in there:
            _demand_open(place.folder)
    except OSError as error:
        raise NotJoined(error.errno, error.strerror, error.filename) from error
    return there


def remove(folders: Sequence[str]) -> None:
    """Remove those groups in which nobody lives; the kernel refuses the others (EBUSY)."""
    for folder in reversed(folders):
        with suppress(OSError):
            os.rmdir(folder)


def sweep(folder: str) -> None:
    """Remove the groups below `folder` that were made for trees which have ended: nobody of us was there then."""
    with suppress(OSError), os.scandir(folder) as entries:
        ours = [entry for entry in entries if _is_own(entry.name)]
        remove([entry.path for entry in ours if time.time() - entry.stat().st_mtime > GRACE_S])


def _is_own(name: str) -> bool:
    """Without a regular expression: compiling one is 0.2 ms of a restore."""
    label, _, number = name.removeprefix(_OWN).partition("-")
    return (
        name.startswith(_OWN)
        and label.isdecimal()
        and len(number) == 8
        and not number.strip("0123456789abcdef")
    )


@contextmanager
def doors(places: Sequence[Place]) -> Iterator[tuple[int, list[int]]]:
    """Descriptors by which a process comes into groups: the directory of v2 (-1: none) for clone3(2), `tasks` of v1."""
    with ExitStack() as stack:
        yield _opened(places, stack)


def _opened(places: Sequence[Place], stack: ExitStack) -> tuple[int, list[int]]:
    directory, tasks = -1, []
    try:
        for place in places:
            v2 = place.hierarchy.controllers == V2
            path, flags = (place.folder, os.O_DIRECTORY) if v2 else (f"{place.folder}/tasks", os.O_WRONLY)
            fd = os.open(path, flags | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            if v2:
                directory = fd
            else:
                tasks.append(fd)
    except OSError as error:
        raise NotJoined(error.errno, error.strerror, error.filename) from error
    return directory, tasks


def _make(place: Place, made: list[str]) -> None:
    folder = place.hierarchy.point
    for name in place.folder[len(folder) + 1 :].split("/"):
        folder = f"{folder}/{name}"
        with suppress(FileExistsError):
            os.mkdir(folder, 0o755)  # whatever the umask is: nobody else makes groups in there
            made.append(folder)


def _demand_open(folder: str) -> None:
    """Who is born in a frozen group never runs, and we would wait for it; the rest is permission."""
    os.close(os.open(f"{folder}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
    if _is_frozen(folder):
        raise OSError(0, "it is frozen", folder)


def _is_frozen(folder: str) -> bool:
    """By itself or by a group above it."""
    for name, frozen in (("cgroup.events", "frozen 1"), ("freezer.state", "FR")):
        with suppress(FileNotFoundError), open(f"{folder}/{name}") as file:
            if any(line.startswith(frozen) for line in file):
                return True
    return False


def frozen_group(groups: Mapping[str, str], known: Iterable[Hierarchy]) -> str:
    """Which of its groups (as proc.cgroup has them) keeps a process from running, "" none that is to be seen here."""
    for each in known:
        path = groups.get(each.controllers)
        if path is not None and each.shows(path) and _is_frozen(each.folder(path)):
            return each.folder(path)
    return ""
