"""Giving unix sockets their names.

What getsockname(2) shows is the string that bind(2) was given, whatever it was relative to and whatever
became of the file. So a socket is bound inside a private directory that a thread of ours takes as its root
directory, under exactly its old name; then the socket file is moved to where it belongs, replacing the old
one in one step, or removed when the original had been unlinked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lazyproc.errors import RestoreError
from lazyproc.kernel.sockopt import SIOCUNIXFILE
from lazyproc.kernel.sys import syscall
from lazyproc.model import UnixSocket
from lazyproc.restore.contents import parent_of
from lazyproc.restore.workshop import OpenPath

SYS_UNSHARE, CLONE_FS = 272, 0x200
SYS_SETRESUID, SYS_SETRESGID, SYS_SETFSUID = 117, 119, 122
_KEEP = -1


def bind(sock: socket.socket, name: bytes) -> None:
    """Give a name without a file: abstract, or of a socket file that is gone."""
    if name.startswith(b"\0"):
        sock.bind(name)
        return
    with tempfile.TemporaryDirectory(prefix="lazyproc-") as stage:
        _bind_below(sock, name, stage)


def bind_with_file(sock: socket.socket, unix: UnixSocket, open_path: OpenPath) -> None:
    """Give a name and put the socket file in its place, with its permissions; `open_path` begins at the tree's root
    directory.

    Raises RestoreError when the directory is missing or something else lies there. A socket file that no
    socket is bound to any more, such as the one the original left behind, is replaced.
    """
    with parent_of(open_path, unix.path) as (parent, name):
        place = f"/proc/self/fd/{parent}/{name}"
        check_place(place, unix.path)
        with tempfile.TemporaryDirectory(prefix=".lazyproc-", dir=os.path.dirname(place)) as stage:
            file = _bind_below(sock, unix.name, stage)
            os.chown(file, unix.uid, unix.gid)
            os.chmod(file, stat.S_IMODE(unix.mode))
            os.rename(file, place)


def check_place(place: str, path: str) -> None:
    """Raise RestoreError unless a socket file can be put at `place`, which the tree calls `path`."""
    if not os.path.isdir(os.path.dirname(place)):
        raise RestoreError(
            f"the directory of socket {path} is missing",
            where=os.path.dirname(path),
            remedy="make it, with the owner and permissions it has on the source",
        )
    try:
        there = os.lstat(place)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(there.st_mode) or _has_owner(place):
        what = "another socket" if stat.S_ISSOCK(there.st_mode) else "a file that is no socket"
        raise RestoreError(
            f"{what} is in the place of the tree's socket", where=path, remedy="stop its owner or remove it"
        )


def _has_owner(place: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(place) != errno.ECONNREFUSED


def _bind_below(sock: socket.socket, name: bytes, stage: str) -> str:
    """Bind with `stage` as root and working directory; the path of the socket file."""
    file = stage + os.path.normpath("/" + os.fsdecode(name))
    os.makedirs(os.path.dirname(file), exist_ok=True)
    failures: list[OSError] = []

    def work() -> None:
        try:
            syscall(SYS_UNSHARE, CLONE_FS)
            os.chroot(stage)
            os.chdir("/")
            sock.bind(name)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="bind")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return file


@contextmanager
def address_of(sock: socket.socket, name: bytes) -> Iterator[str | bytes]:
    """Where to send or connect to reach a named socket of ours, even one whose file is gone."""
    if name.startswith(b"\0"):
        yield name
        return
    with descriptor_of(sock) as file:
        yield f"/proc/self/fd/{file}"


@contextmanager
def descriptor_of(sock: socket.socket) -> Iterator[int]:
    """An O_PATH descriptor of the file of a named socket of ours."""
    file = fcntl.ioctl(sock, SIOCUNIXFILE)
    try:
        yield file
    finally:
        os.close(file)


@contextmanager
def acting_as(credentials: tuple[int, int, int] | None) -> Iterator[None]:
    """The calling thread has this effective uid and gid, which is what SO_PEERCRED of the other end will
    show; the pid it shows can only be ours. File access stays root's.
    """
    own = os.geteuid(), os.getegid()
    if credentials is None or credentials[1:] == own:
        yield
        return
    _pid, uid, gid = credentials
    syscall(SYS_SETRESGID, _KEEP, gid, _KEEP)
    try:
        syscall(SYS_SETRESUID, _KEEP, uid, _KEEP)
        try:
            syscall(SYS_SETFSUID, own[0])
            yield
        finally:
            syscall(SYS_SETRESUID, _KEEP, own[0], _KEEP)
    finally:
        syscall(SYS_SETRESGID, _KEEP, own[1], _KEEP)
