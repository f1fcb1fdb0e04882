"""Connections through ssh(1): it proves both ends and encrypts, and `lazyproc stdio` there joins it to a receiver.

Each connection is a process of its own, so that urgent and bulk share no queue. Nobody can be asked for a password:
the work belongs to no terminal. What the user has in ~/.ssh counts; nothing here changes whom ssh trusts.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from lazyproc.errors import ConnectionLost, LazyprocError, ProtocolError, UsageError
from lazyproc.facts import dataclass, replace
from lazyproc.pages.address import SCHEME
from lazyproc.wire.native import VERSION

START_S = 30.0  # for ssh to log in and find lazyproc there
END_S = 5.0
LINE_MAX = 80  # bytes of the greeting
NOT_FOUND = 127  # sh(1)
SSH_FAILED = 255  # ssh(1)
OPTIONS = (
    "-T",
    *(
        word
        for option in (
            "BatchMode=yes",
            "ControlMaster=no",  # a shared connection is one queue for all
            "ControlPath=none",
            "ClearAllForwardings=yes",  # each would be wanted four times
            "RemoteCommand=none",
            "ConnectTimeout=10",
            "ServerAliveInterval=5",
            "ServerAliveCountMax=3",
        )
        for word in ("-o", option)
    ),
)
_NAME = r"[\w.][\w.-]*"
_TARGET = re.compile(
    rf"{SCHEME}(?:({_NAME})@)?({_NAME}|\[[0-9A-Fa-f:.]+\])(?::(\d{{1,5}}))?(?:/(\d{{1,5}})?)?", re.ASCII
)
_GREETING = re.compile(rb"lazyproc (\d+) (\d*)\n")


def greeting(port: int | None = None) -> bytes:
    """The first thing that `lazyproc stdio` says: the version of the protocol there, and the port of a new receiver."""
    return f"lazyproc {VERSION} {port or ''}\n".encode()


@dataclass(frozen=True, slots=True)
class Ssh:
    """ssh://[USER@]HOST[:PORT][/RECEIVER]: `receiver` is the port where one listens on that host's 127.0.0.1."""

    user: str
    host: str
    port: str
    receiver: str

    @classmethod
    def parse(cls, text: str) -> Ssh:
        """Raises UsageError."""
        match = _TARGET.fullmatch(text)
        if not match:
            raise UsageError("is not an address", where=repr(text), remedy="write ssh://[USER@]HOST[:PORT]")
        return cls(*(group or "" for group in match.groups()))

    def __str__(self) -> str:
        user, port = f"{self.user}@" if self.user else "", f":{self.port}" if self.port else ""
        return f"{SCHEME}{user}{self.host}{port}" + (f"/{self.receiver}" if self.receiver else "")

    @property
    def words(self) -> list[str]:
        """What ssh(1) calls that host."""
        port = ["-p", self.port] if self.port else []
        host = self.host.strip("[]")
        return [*port, "--", f"{self.user}@{host}" if self.user else host]

    def command(self, *remote: str) -> str:
        """For the user to try."""
        return " ".join(["ssh", *(word for word in self.words if word != "--"), *remote])

    def argv(self) -> list[str]:
        """ssh(1) that runs `lazyproc stdio` there."""
        return [
            "ssh",
            *OPTIONS,
            *self.words,
            "lazyproc",
            "stdio",
            *([self.receiver] if self.receiver else []),
        ]


@contextmanager
def started(target: str) -> Iterator[str]:
    """The address of a receiver: the one that `target` names, or one that is started there.

    That ends with the context; the keepers of trees it has taken in go on, and can be reached at the same address.
    Raises UsageError, ConnectionLost, ProtocolError.
    """
    ssh = Ssh.parse(target)
    if ssh.receiver:
        yield target
        return
    sock, process, port = _open(ssh)
    with sock:
        try:
            yield str(replace(ssh, receiver=port))
        finally:
            sock.shutdown(socket.SHUT_WR)
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)


def connected(target: str) -> socket.socket:
    """A connection to the receiver that `target` names; its other end is ssh(1), which ends with it.

    Raises UsageError, ConnectionLost, ProtocolError.
    """
    ssh = Ssh.parse(target)
    if not ssh.receiver:
        raise UsageError("names no receiver", where=target, remedy="write ssh://HOST/N, its port there")
    return _open(ssh)[0]  # the next Popen reaps what has ended


def _open(ssh: Ssh) -> tuple[socket.socket, subprocess.Popen[bytes], str]:
    """What stands when lazyproc there has said its greeting; the port in that."""
    ours, its = socket.socketpair()
    with os.fdopen(os.memfd_create("ssh"), "w+b", buffering=0) as log:
        with its:
            process = _start(ssh.argv(), its.fileno(), log)
        try:
            line = _first_line(ours)
            said = _GREETING.fullmatch(line)
            if said is None:
                raise _failure(process, ssh, line, log)
            if int(said[1]) != VERSION:
                raise ProtocolError(
                    f"lazyproc there speaks version {int(said[1])} of the protocol, and here {VERSION}",
                    where=str(ssh),
                    remedy="install the same version of lazyproc on both hosts",
                )
        except BaseException:
            ours.close()
            process.kill()
            process.wait()
            raise
    ours.settimeout(None)
    return ours, process, said[2].decode()


def _start(argv: list[str], end: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """In a session of its own: what is to stop our work is not to cut its connections."""
    try:
        return subprocess.Popen(argv, stdin=end, stdout=end, stderr=log, start_new_session=True)
    except OSError as error:
        raise LazyprocError(
            f"cannot be started: {error.strerror}", where="ssh", remedy="install the package openssh-client"
        ) from None


def _first_line(sock: socket.socket) -> bytes:
    """Or what there is of it. Not a byte more is read: what follows belongs to the connection."""
    until = time.monotonic() + START_S
    line = b""
    while not line.endswith(b"\n") and len(line) < LINE_MAX:
        sock.settimeout(max(0.001, until - time.monotonic()))
        try:
            byte = sock.recv(1)
        except OSError:
            break
        if not byte:
            break
        line += byte
    return line


def _failure(process: subprocess.Popen[bytes], ssh: Ssh, line: bytes, log: IO[bytes]) -> ConnectionLost:
    """Why there is no connection, in the words of ssh, the shell or lazyproc there."""
    if line:
        what = f"something else answers before lazyproc does ({line!r})"
        return ConnectionLost(what, where=str(ssh), remedy="the login shell there must print nothing")
    try:
        code = process.wait(END_S)
    except subprocess.TimeoutExpired:
        what, remedy = f"no answer within {START_S:.0f} s", f"try {ssh.command('lazyproc', 'check')}"
        return ConnectionLost(what, where=str(ssh), remedy=remedy)
    log.seek(0)
    words = log.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(words) if line.strip()), f"ssh ended with {code}")
    what, remedy = _explained(code, last, ssh)
    return ConnectionLost(what, where=str(ssh), remedy=remedy)


def _explained(code: int, last: str, ssh: Ssh) -> tuple[str, str]:
    """What happened, and what the user can do; `last` is what was said last before it ended with `code`."""
    if code == SSH_FAILED:
        remedy = f"`{ssh.command()}` has to work without a question: with a key or an agent, and a known host"
        return last, remedy
    if code == NOT_FOUND:
        what = f"lazyproc is not found there ({last})"
        return what, "install it on that host, in the PATH of the commands that ssh runs there"
    if "invalid choice" in last:  # argparse
        return "lazyproc there is too old for ssh://", "install the same version of lazyproc on both hosts"
    return last.removeprefix("lazyproc: "), f"see {ssh.command('lazyproc', 'check')}"
