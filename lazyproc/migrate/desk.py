"""Where a session's keeper can be reached by other commands of this host: a unix socket with the session's name.

It is an abstract one, so it is there exactly as long as its keeper, and belongs to the network namespace. Who asks must
be root or the same user. A request and its answer are one packet each: JSON, and for a connection its descriptor.
"""

from __future__ import annotations

import array
import errno
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lazyproc.errors import NoSuchProcess, PermissionDenied, UsageError
from lazyproc.kernel import proc
from lazyproc.pages.peer import Trust

PACKET_MAX = 1 << 16
ANSWER_S = 5.0
INODE = 6  # the column of /proc/net/unix
SAY_S = 1.0  # the keeper has more to do than to wait for who has connected and says nothing


def _name(session: str, role: str) -> str:
    return f"\0lazyproc/{role}/{session[:64]}"  # sun_path has 108 bytes, a session up to 128


class Desk:
    """The keeper's end. `fileno` becomes readable when `next` has something."""

    def __init__(self, session: str, role: str) -> None:
        """Raises UsageError when there is one."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.bind(_name(session, role))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            remedy = "see its processes in lazyproc sessions"
            raise UsageError("is being worked on", where=session, remedy=remedy) from None
        self._socket.listen()

    def fileno(self) -> int:
        return self._socket.fileno()

    def next(self) -> Request | None:
        """Who asks now; None when he may not, or has gone."""
        caller, _ = self._socket.accept()
        caller.settimeout(SAY_S)
        fds: list[int] = []
        try:
            Trust().check(caller)
            data, fds, _, _ = socket.recv_fds(caller, PACKET_MAX, 1)
            fields = json.loads(data)
            if isinstance(fields, dict):
                return Request(caller, fields, fds.pop() if fds else -1)
        except (PermissionDenied, OSError, ValueError, RecursionError):
            pass
        caller.close()
        for fd in fds:
            os.close(fd)
        return None

    def close(self) -> None:
        self._socket.close()


class Request:
    """What is asked, maybe with a descriptor that came along; it is closed with the answer unless it was taken."""

    def __init__(self, caller: socket.socket, fields: Mapping[str, Any], fd: int) -> None:
        self._caller = caller
        self.fields = fields
        self._fd = fd

    def take_socket(self) -> socket.socket:
        """What came along. Raises OSError or ValueError unless it is a socket."""
        taken = socket.socket(fileno=self._fd)
        self._fd = -1
        return taken

    def answer(self, fields: Mapping[str, object]) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        with self._caller, suppress(OSError):
            self._caller.send(json.dumps(fields).encode())


def ask(session: str, role: str, fields: Mapping[str, object], fd: int = -1) -> Mapping[str, Any] | None:
    """The keeper's answer; None when there is no keeper. `fd` stays the caller's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.settimeout(ANSWER_S)
        try:
            caller.connect(_name(session, role))
            Trust().check(caller)
            rights = array.array("i", [fd] if fd >= 0 else [])
            caller.sendmsg([json.dumps(fields).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            answer: Mapping[str, Any] = json.loads(caller.recv(PACKET_MAX))
            return answer
        except (PermissionDenied, OSError, ValueError):
            return None


def has_desk(pid: int, session: str, role: str) -> bool:
    """Whether that process is one of those who have the keeper's descriptors, and not a later one with its number; in
    whatever network namespace it is.
    """
    name = _name(session, role).replace("\0", "@")  # as unix(7) writes it
    with suppress(OSError, NoSuchProcess):
        rows = (line.split() for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines())
        desks = {f"socket:[{row[INODE]}]" for row in rows if row[-1] == name}
        for number in proc.descriptor_numbers(pid) if desks else ():
            with suppress(FileNotFoundError):
                if os.readlink(f"/proc/{pid}/fd/{number}") in desks:
                    return True
    return False


def is_staffed(session: str, role: str) -> bool:
    """Whether a keeper, or one of those who have his descriptors, lives."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.settimeout(ANSWER_S)
        try:
            caller.connect(_name(session, role))
        except BlockingIOError:  # many are asking
            return True
        except OSError:
            return False
        return True
