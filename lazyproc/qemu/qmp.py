"""QMP, the monitor protocol of QEMU, on a unix socket: one command at a time (docs/interop/qmp-spec of QEMU)."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, Self

from lazyproc.errors import ConnectionLost, LazyprocError, ProtocolError, UsageError

PATIENCE_S = 10.0
FLUSH_S = (
    120.0  # for what waits until disks have written all that is under way: `stop`, and what comes behind it
)
MESSAGE_MAX = 1 << 24  # bytes
PIECE = 1 << 16
INHERITED = 1 << 32  # the first number of who goes on for another
_SCM_CREDENTIALS = struct.Struct("3i")


class Refusal(LazyprocError):
    """QEMU answers a command with an error."""


class Qmp:
    """A client, past the greeting. A context manager. Whoever else has the same monitor open waits meanwhile: a QMP
    socket serves one client at a time.
    """

    def __init__(self, path: str, *, timeout: float = PATIENCE_S) -> None:
        """Raises UsageError when nobody listens there, ConnectionLost when another client is served."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise UsageError(
                f"no QMP monitor answers ({error.strerror})",
                where=path,
                remedy="start QEMU with -qmp unix:PATH,server=on,wait=off",
            ) from error
        try:
            self._begin(sock, path, timeout)
        except TimeoutError:
            raise ConnectionLost(
                "the monitor does not greet: it serves one client at a time, and has another",
                where=path,
                remedy="give QEMU a second one (-qmp)",
            ) from None

    @classmethod
    def over(cls, sock: socket.socket, name: str, *, timeout: float = PATIENCE_S) -> Self:
        """On a socket whose other end QEMU has, called `name` in errors; it belongs to the client. Raises
        ConnectionLost, TimeoutError.
        """
        client = cls.__new__(cls)
        client._begin(sock, name, timeout)
        return client

    @classmethod
    def inherited(cls, sock: socket.socket, name: str) -> Self:
        """On the socket of a client that was killed. What it had asked may still be answered, to numbers below ours."""
        client = cls.__new__(cls)
        client._take(sock, name, INHERITED)
        return client

    def _take(self, sock: socket.socket, path: str, asked: int = 0) -> None:
        self.path = path
        self._sock = sock
        self._buffer = b""
        self._asked = asked
        self._command = ""
        self._events: list[dict[str, Any]] = []

    def _begin(self, sock: socket.socket, path: str, timeout: float) -> None:
        self._take(sock, path)
        try:
            self.version: tuple[int, int, int] = _version(self._next(time.monotonic() + timeout))
            self.execute("qmp_capabilities", timeout=timeout)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def peer_pid(self) -> int:
        """Who has begun to listen there: QEMU, unless its socket was passed to it. In our pid namespace; 0 outside."""
        raw = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _SCM_CREDENTIALS.size)
        pid: int = _SCM_CREDENTIALS.unpack(raw)[0]
        return pid

    def inode(self) -> int:
        """Of our end, by which sock_diag(7) knows the other."""
        return os.fstat(self._sock.fileno()).st_ino

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout: float = PATIENCE_S,
    ) -> Any:
        """What the command returns. `fds` travel with it (getfd, add-fd).

        QEMU answers in order: who was interrupted, or has a TimeoutError, may go on asking, and gets the answer to that
        once the command before is done. Raises Refusal, ConnectionLost, ProtocolError, TimeoutError.
        """
        self.ask(command, arguments, fds=fds)
        return self.answer(timeout=timeout)

    def ask(self, command: str, arguments: dict[str, Any] | None = None, *, fds: Sequence[int] = ()) -> None:
        """Without waiting for the answer. Raises ConnectionLost."""
        self._asked += 1
        self._command = command
        words = {"execute": command, "arguments": arguments or {}, "id": self._asked}
        request = json.dumps(words).encode() + b"\n"
        try:
            sent = socket.send_fds(self._sock, [request], list(fds))
            if sent < len(request):  # sending nothing fails as well when it has hung up (`quit`)
                self._sock.sendall(request[sent:])
        except OSError as error:
            raise ConnectionLost(f"QEMU has hung up ({error.strerror})", where=self.path) from error

    def answer(self, *, timeout: float = PATIENCE_S) -> Any:
        """What the last command returns. Raises as `execute`; after a TimeoutError it may be asked for again."""
        deadline = time.monotonic() + timeout
        while True:
            message = self._next(deadline)
            if "event" in message:
                self._events.append(message)
            elif message.get("id") != self._asked:  # to a command that nobody waits for any more
                continue
            elif "error" in message:
                raise Refusal(str(message["error"].get("desc")), where=f"QMP {self._command}")
            elif "return" in message:
                return message["return"]

    def hmp(self, line: str) -> str:
        """What the human monitor prints for a line. Raises as `execute`."""
        return str(self.execute("human-monitor-command", {"command-line": line}))

    def event(self, *names: str, timeout: float = PATIENCE_S) -> dict[str, Any]:
        """The next event of one of these names, also one that came before; others are forgotten. Raises TimeoutError,
        ConnectionLost, ProtocolError.
        """
        deadline = time.monotonic() + timeout
        while True:
            message = self._events.pop(0) if self._events else self._next(deadline)
            if message.get("event") in names:
                return message

    def came(self, name: str) -> bool:
        """Whether an event of this name came with the answers so far, since `forget`."""
        return any(message["event"] == name for message in self._events)

    def forget(self) -> None:
        """The events that came so far."""
        self._events.clear()

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._sock.settimeout(max(0, deadline - time.monotonic()))  # what is there is read in any case
            try:
                data = self._sock.recv(PIECE)
            except (TimeoutError, BlockingIOError):
                raise TimeoutError("QEMU does not answer") from None
            except OSError as error:
                raise ConnectionLost(f"QEMU has hung up ({error.strerror})", where=self.path) from error
            if not data:
                raise ConnectionLost("QEMU has hung up", where=self.path)
            self._buffer += data
            if len(self._buffer) > MESSAGE_MAX:
                raise ProtocolError("QEMU's answer has no end", where=self.path)
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise ProtocolError("is no QMP monitor", where=self.path)
        return message


def _version(greeting: dict[str, Any]) -> tuple[int, int, int]:
    try:
        found = greeting["QMP"]["version"]["qemu"]
        return int(found["major"]), int(found["minor"]), int(found["micro"])
    except (KeyError, TypeError, ValueError):
        raise ProtocolError("greets as no QMP monitor does") from None
