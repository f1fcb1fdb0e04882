"""Cgroups: the hierarchies that are mounted here, and groups in them (cgroups(7), admin-guide/cgroup-v2.rst).

The path of a group is that of /proc/PID/cgroup: "/" is the root of the hierarchy, or of our cgroup namespace.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from lazyproc.facts import dataclass
from lazyproc.kernel import proc

V2 = ""  # what /proc/PID/cgroup has in place of controllers
SYSTEMD = "name=systemd"  # where a systemd that does not use v2 keeps its units
GRACE_S = 10  # an empty group of this age is not waiting for its first process


_OWN = re.compile(r"lazyproc-\d+-[0-9a-f]{8}")


def own_name(label: int) -> str:
    """The name of a new group for a tree; `sweep` knows it again."""
    return f"lazyproc-{label}-{os.urandom(4).hex()}"


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
        return os.path.join(self.point, os.path.relpath(path, self.root)).removesuffix("/.")


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
    found: dict[str, Hierarchy] = {}
    for mount in mounts:
        controllers = _controllers(mount, own)
        if controllers is not None and not mount.root.startswith("/.."):
            found.setdefault(controllers, Hierarchy(controllers, mount.point, mount.root, own[controllers]))
    return tuple(found.values())


def _controllers(mount: proc.Mount, own: Mapping[str, str]) -> str | None:
    """Which line of /proc/PID/cgroup is about a mount: the options of one of v1 have its controllers, among flags."""
    if mount.kind == "cgroup2":
        return V2 if V2 in own else None
    named = (each for each in own if each != V2 and set(each.split(",")) <= set(mount.options))
    return next(named, None)


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
        ours = [entry for entry in entries if _OWN.fullmatch(entry.name)]
        remove([entry.path for entry in ours if time.time() - entry.stat().st_mtime > GRACE_S])


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
    for name in os.path.relpath(place.folder, folder).split("/"):
        folder = f"{folder}/{name}"
        with suppress(FileExistsError):
            os.mkdir(folder)
            made.append(folder)


def _demand_open(folder: str) -> None:
    """Who is born in a frozen group never runs, and we would wait for it; the rest is permission."""
    os.close(os.open(f"{folder}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
    for name, frozen in (("cgroup.events", "frozen 1"), ("freezer.state", "FR")):
        with suppress(FileNotFoundError), open(f"{folder}/{name}") as file:
            if any(line.startswith(frozen) for line in file):
                raise OSError(0, "it is frozen", folder)
