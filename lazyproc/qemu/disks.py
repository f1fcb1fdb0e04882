"""Disk images that a QEMU lets go of, and has to take again.

With the devices it saves the source opens its images for reading only, and a destination has them so until its guest
runs. Both open them by name again (block/file-posix.c raw_reconfigure_getfd), as whom they run by then.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from lazyproc.errors import Obstacle
from lazyproc.kernel import proc
from lazyproc.kernel.sys import open_in
from lazyproc.qemu.qmp import Qmp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lazyproc.restore.users import User

FDSET = "/dev/fdset/"  # descriptors that QEMU was given


def out_of_reach(qmp: Qmp, pid: int) -> Iterator[Obstacle]:
    """Those that QEMU, process `pid`, would not get again by name: that is another file's by now, or nobody's, or it
    may not write it, since it has dropped its rights. Raises NoSuchProcess.
    """
    images = sorted(set(_written(qmp)))
    if not images:
        return
    user, has = _dropped_to(pid), set(_open_files(pid))
    for path in images:
        if _named(pid, path) not in has:
            yield Obstacle(
                0,
                f"image {path}",
                "is not what QEMU has open: that was deleted or replaced, or it is what -snapshot writes to",
                "start the guest without -snapshot, from an image that keeps its name",
            )
        elif user is not None and not _may_write(pid, user, path):
            yield Obstacle(
                0,
                f"image {path}",
                f"could not be opened again by uid {user.uid}, as whom QEMU runs",
                "let that user write it",
            )


def _dropped_to(pid: int) -> User | None:
    """As whom QEMU runs, unless as root."""
    status = proc.status(proc.read(pid, "status"))
    if status.uid.fs == 0:
        return None
    from lazyproc.restore.users import User

    return User(status.uid.fs, status.gid.fs, status.groups)


def _written(qmp: Qmp) -> Iterator[str]:
    for node in qmp.execute("query-named-block-nodes", {"flat": True}):
        if node["drv"] in ("file", "host_device") and not node["ro"] and not node["file"].startswith(FDSET):
            yield str(node["file"])


def _open_files(pid: int) -> Iterator[tuple[int, ...]]:
    for number in proc.descriptor_numbers(pid):
        with suppress(OSError):  # closed meanwhile
            yield _identity(os.stat(f"/proc/{pid}/fd/{number}"))


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """A device has several names, and each is a file of its own."""
    return (found.st_rdev,) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)


def _named(pid: int, path: str) -> tuple[int, ...] | None:
    """What has this name for QEMU."""
    with suppress(OSError), _home(pid, path) as home, _found(home, path) as file:
        return _identity(os.fstat(file))
    return None


def _may_write(pid: int, user: User, path: str) -> bool:
    from lazyproc.restore.users import acting_as

    acting = acting_as(user) if os.geteuid() == 0 else nullcontext()
    with suppress(OSError), _home(pid, path) as home, acting, _found(home, path) as file:
        return os.access(f"/proc/self/fd/{file}", os.R_OK | os.W_OK, effective_ids=True)
    return False


@contextmanager
def _home(pid: int, path: str) -> Iterator[int]:
    """QEMU's root or working directory, which only we may look up there."""
    home = os.open(f"/proc/{pid}/{'root' if path.startswith('/') else 'cwd'}", os.O_PATH | os.O_CLOEXEC)
    try:
        yield home
    finally:
        os.close(home)


@contextmanager
def _found(home: int, path: str) -> Iterator[int]:
    """Raises OSError."""
    flags = os.O_PATH | os.O_CLOEXEC
    file = open_in(home, path, flags) if path.startswith("/") else os.open(path, flags, dir_fd=home)
    try:
        yield file
    finally:
        os.close(file)
