"""lazy-pages.socket: `criu restore --lazy-pages` hands over its userfaultfds (CRIU 4.2, criu/uffd.c).

The restorer connects once. Every process then sends its number as an int32, and in a second message its userfaultfd; a
zombie sends its negative number alone. They come in any order. When all processes are restored, and before the first
one runs, comes the word FINISHED. Nothing is ever answered.

Each process closes its own userfaultfd, so what arrives here is the only one: when that goes, what is missing is zeros.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lazyproc.errors import (
    CannotListen,
    ConnectionLost,
    LazyprocError,
    NoSuchProcess,
    PermissionDenied,
    ProtocolError,
)
from lazyproc.events import Listener, Note
from lazyproc.facts import dataclass
from lazyproc.kernel import proc
from lazyproc.kernel.ready import readable
from lazyproc.kernel.sys import pidfd_open
from lazyproc.pages.peer import Trust

NAME = "lazy-pages.socket"
FINISHED = 0x52535446  # "RSTF"
BACKLOG = 8
LINK = "anon_inode:[userfaultfd]"
SCM_CREDENTIALS = 2
_WORD = struct.Struct("<I")
_NUMBER = struct.Struct("<i")
_CREDENTIALS = struct.Struct("<3i")  # struct ucred
_MANY_FDS = 64  # room for more than the one that is right, so that none stays open unseen


@dataclass(frozen=True, slots=True)
class Handed:
    """One process's. `pid` is its number here, 0 where it cannot be seen; `started` is Stat.start_time."""

    vpid: int
    pid: int
    started: int
    userfaultfd: int


class GaveUp(LazyprocError):
    """The restorer ended in the middle of the restore; these processes may be left of it."""

    def __init__(self, why: str, handed: tuple[Handed, ...]) -> None:
        super().__init__(f"the restore failed ({why})", where=NAME, remedy="see the log of `criu restore`")
        self.handed = handed


class Restorer:
    """A connection of `criu restore`: `read` takes what there is, without waiting."""

    def __init__(self, sock: socket.socket, expected: Mapping[int, bool]) -> None:
        """`expected`: the processes of the images, and whether each has memory."""
        self._socket = sock
        self._expected = expected
        self._word = b""
        self._of: tuple[int, int] | None = None  # vpid and pid of who sends a userfaultfd next
        self.handed: dict[int, Handed] = {}
        self.begun = False  # it has said something
        self._dead: set[int] = set()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.pidfd = _pidfd_of_peer(sock)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def complete(self) -> bool:
        return len(self.handed) + len(self._dead) == len(self._expected)

    def read(self) -> None:
        """Raises ProtocolError for what no restorer of these images sends, ConnectionLost at the end."""
        with suppress(BlockingIOError):
            while not self.complete:
                if self._of is None:
                    self._read_number()
                else:
                    self._read_userfaultfd(*self._of)

    def check(self) -> None:
        """Raises ConnectionLost when the restorer itself has ended: its processes keep the connection open."""
        if self.pidfd >= 0 and readable([self.pidfd], 0) and not self.complete:
            raise ConnectionLost("it has ended")

    def detach(self) -> tuple[int, int]:
        """The connection and the restorer's pidfd (-1: not known), which are the caller's from now on."""
        pidfd, self.pidfd = self.pidfd, -1
        return self._socket.detach(), pidfd

    def close(self) -> None:
        for each in self.handed.values():
            os.close(each.userfaultfd)
        self.handed.clear()
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self._socket.close()

    def _receive(self, length: int) -> tuple[bytes, list[int], int]:
        """Data, descriptors, and the number here of who sent it (0: not known)."""
        room = socket.CMSG_SPACE(4 * _MANY_FDS) + socket.CMSG_SPACE(_CREDENTIALS.size)
        data, control, flags, _ = self._socket.recvmsg(length, room, socket.MSG_CMSG_CLOEXEC)
        fds: list[int] = []
        pid = 0
        for _, kind, content in control:
            if kind == SCM_CREDENTIALS:
                pid = _CREDENTIALS.unpack(content)[0]
            elif kind == socket.SCM_RIGHTS:
                whole = content[: len(content) // 4 * 4]
                fds += struct.unpack(f"<{len(whole) // 4}i", whole)
        if not data or flags & socket.MSG_CTRUNC:
            _close(fds)
            raise ConnectionLost("the connection was closed") if not data else ProtocolError("too many")
        self.begun = True
        return data, fds, pid

    def _read_number(self) -> None:
        data, fds, pid = self._receive(_NUMBER.size - len(self._word))
        if fds:
            _close(fds)
            raise ProtocolError("sent a descriptor where a process's number is due")
        self._word += data
        if len(self._word) < _NUMBER.size:
            return
        (number,) = _NUMBER.unpack(self._word)
        self._word = b""
        vpid = abs(number)
        if vpid not in self._expected or vpid in self.handed or vpid in self._dead:
            raise ProtocolError(f"speaks of process {number}, which is not awaited")
        if self._expected[vpid] != (number > 0):
            raise ProtocolError(f"says that process {vpid} is {'alive' if number > 0 else 'dead'}")
        if number > 0:
            self._of = vpid, pid
        else:
            self._dead.add(vpid)

    def _read_userfaultfd(self, vpid: int, pid: int) -> None:
        _, fds, _ = self._receive(1)
        if len(fds) != 1 or os.readlink(f"/proc/self/fd/{fds[0]}") != LINK:
            _close(fds)
            raise ProtocolError(f"sent no userfaultfd of process {vpid}")
        self._of = None
        pid, started = _seen(pid, vpid)
        self.handed[vpid] = Handed(vpid, pid, started, fds[0])


def _seen(pid: int, vpid: int) -> tuple[int, int]:
    """(0, 0) for who cannot be seen from here, or is not the one that it says."""
    try:
        if pid and proc.status(proc.read(pid, "status")).ns_pid[-1] == vpid:
            return pid, proc.stat(proc.read(pid, "stat")).start_time
    except NoSuchProcess:
        pass
    return 0, 0


def _pidfd_of_peer(sock: socket.socket) -> int:
    pid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
    try:
        return pidfd_open(pid) if pid else -1
    except OSError:  # it has gone: the connection says so
        return -1


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class Door:
    """The listening socket in a folder, where CRIU looks for it; one that an earlier one has left is replaced."""

    def __init__(self, directory: Path) -> None:
        """Raises CannotListen."""
        self._path = directory / NAME
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._appear(directory)
        except OSError as error:
            self._socket.close()
            raise CannotListen(
                os.strerror(error.errno or 0).lower(),
                where=str(self._path),
                remedy="choose another folder with --work-dir, for CRIU as well",
            ) from None

    def _appear(self, directory: Path) -> None:
        """Under its name only when one can connect."""
        folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            short = f"/proc/self/fd/{folder}/{NAME}"  # sun_path has 108 bytes
            with suppress(FileNotFoundError):
                if not stat.S_ISSOCK(os.lstat(short).st_mode):
                    raise FileExistsError(errno.EEXIST, "")
            made = f"{short}.{os.getpid()}"
            self._socket.bind(made)
            os.chmod(made, 0o600)
            self._inode = os.lstat(made).st_ino
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._socket.listen(BACKLOG)
            os.rename(made, short)
        finally:
            os.close(folder)

    def accept(self) -> socket.socket:
        return self._socket.accept()[0]

    def fileno(self) -> int:
        return self._socket.fileno()

    def disown(self) -> None:
        """Another process of ours has it."""
        self._socket.close()

    def close(self) -> None:
        """Nobody can connect any more."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        with suppress(OSError):
            if os.lstat(self._path).st_ino == self._inode:
                os.unlink(self._path)


def accepted(door: Door, expected: Mapping[int, bool], listener: Listener) -> Restorer:
    """The first restorer that hands everything over. Who says what none would say is refused, and who may not connect;
    the next may try. Raises GaveUp when a restorer ends before that.
    """
    callers: list[Restorer] = []
    try:
        while True:
            watched = [door.fileno(), *(each.fileno() for each in callers)]
            ready = readable([*watched, *(each.pidfd for each in callers if each.pidfd >= 0)])
            if door.fileno() in ready and (caller := _let_in(door, expected, listener)) is not None:
                callers.append(caller)
            for each in [each for each in callers if ready & {each.fileno(), each.pidfd}]:
                if _hear(each, listener):
                    callers.remove(each)
                    if each.complete:
                        return each
                    each.close()
    finally:
        for each in callers:
            each.close()


def _hear(caller: Restorer, listener: Listener) -> bool:
    """Whether it has come to its end, in one way or the other."""
    try:
        caller.read()
        caller.check()
    except ProtocolError as error:
        listener(Note(f"{NAME}: somebody connected who is no restorer of these images: it {error}"))
        return True
    except (ConnectionLost, OSError) as error:
        raise GaveUp(str(error), tuple(caller.handed.values())) from None
    return caller.complete


def _let_in(door: Door, expected: Mapping[int, bool], listener: Listener) -> Restorer | None:
    with suppress(OSError):
        sock = door.accept()
        try:
            Trust().check(sock)
            return Restorer(sock, expected)
        except (PermissionDenied, OSError) as error:
            sock.close()
            listener(Note(f"{NAME}: {error}"))
    return None


def has_finished(connection: socket.socket) -> bool:
    """Whether FINISHED is there to be read; it is not taken. Raises ConnectionLost at the end, ProtocolError."""
    try:
        data = connection.recv(_WORD.size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConnectionLost(str(error.strerror)) from None
    if not data:
        raise ConnectionLost("the connection was closed")
    if len(data) < _WORD.size and _WORD.pack(FINISHED).startswith(data):
        return False
    if data != _WORD.pack(FINISHED):
        raise ProtocolError(f"sent {data.hex()} where the end of the restore is due")
    return True


def forestall(connection: int) -> bool:
    """Keep the restorer behind this descriptor from finishing; False when it just has. What it says from now on fails,
    and so does the restore.
    """
    with borrowed(connection) as its:
        with suppress(OSError):
            its.shutdown(socket.SHUT_RD)
        try:
            return not has_finished(its)
        except (ConnectionLost, ProtocolError):
            return True


@contextmanager
def borrowed(fd: int) -> Iterator[socket.socket]:
    """A descriptor that stays open."""
    its = socket.socket(fileno=fd)
    try:
        yield its
    finally:
        its.detach()
