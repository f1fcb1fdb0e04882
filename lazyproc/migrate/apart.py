"""Work that goes on when the command that asked for it is gone: nobody's terminal holds a process.

The work runs in a daemon; the command shows what it tells and waits for its result. Interrupted, the command asks the
daemon to stop, which does until the hand-over and then no more. Without a command the work goes on in silence.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from lazyproc.errors import LazyprocError, Parked
from lazyproc.events import Event, Listener, Note
from lazyproc.kernel import family
from lazyproc.kernel.deaf import SIGNALS

T = TypeVar("T")
O_ASYNC = 0o20000
F_SETSIG = 10  # Python does not name them
MESSAGE_MAX = 1 << 17  # bytes
WORDS_MAX = 4000  # characters of an error that does not fit
TAKE_S = 10  # a client that takes no result for so long never will
_TIMEVAL = struct.Struct("ll")
ATTEMPTS = 100  # one that is killed so often is killed on purpose, and for good
Work = Callable[["Client"], T]


class Client:
    """The daemon's side: whoever waits for the work, while he does."""

    def __init__(self, stream: socket.socket) -> None:
        self._socket = stream

    def close(self) -> None:
        self._socket.close()

    def tell(self, event: Event) -> None:
        """A listener for the work's events. Who does not take them in time does without."""
        self._send("event", event, socket.MSG_DONTWAIT)

    def done(self, result: object) -> None:
        self._send("done", result, 0)

    def failed(self, error: BaseException) -> None:
        """With where it was raised, which pickle leaves out."""
        from traceback import format_tb  # only now

        error.add_note(
            "In the process that did the work:\n" + "".join(format_tb(error.__traceback__)).rstrip()
        )
        self._send("failed", error, 0)

    def stop_without_it(self) -> None:
        """From now on the end of the client is SIGINT to us (fcntl(2), F_SETSIG), until we ignore that."""
        fcntl.fcntl(self._socket, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._socket, F_SETSIG, signal.SIGINT)
        flags = fcntl.fcntl(self._socket, fcntl.F_GETFL)
        fcntl.fcntl(self._socket, fcntl.F_SETFL, flags | O_ASYNC)
        if not self.listens():
            raise KeyboardInterrupt

    def listens(self) -> bool:
        """Whether somebody still waits."""
        try:
            return bool(self._socket.recv(1, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _send(self, kind: str, value: object, flags: int) -> None:
        """The client may have gone, or not listen; the work is not for him alone."""
        try:
            data = pickle.dumps((kind, value))
        except Exception:  # an error of somebody else's making
            data = pickle.dumps((kind, LazyprocError(f"{value!r:.{WORDS_MAX}}", remedy="report it")))
        if len(data) > MESSAGE_MAX:
            data = pickle.dumps((kind, Note(_beginning(value)) if kind == "event" else _shortened(value)))
        with suppress(OSError):
            self._socket.send(data, flags)


def _shortened(value: object) -> LazyprocError:
    """What is too long for a message, as its words: some of it the other side of a migration may have made up."""
    short = LazyprocError(_beginning(value))
    short.exit_code = getattr(value, "exit_code", short.exit_code)
    return short


def _beginning(value: object) -> str:
    return f"{getattr(value, 'text', value)!s:.{WORDS_MAX}}…"


class Messages:
    """The command's side: what the daemon has told so far."""

    def __init__(self, stream: socket.socket) -> None:
        self._socket = stream

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> tuple[str, Any] | None:
        """The next message, waited for; None when nothing will come any more."""
        data = self._socket.recv(MESSAGE_MAX)
        return pickle.loads(data) if data else None

    def close(self) -> None:
        self._socket.close()


def stream() -> tuple[socket.socket, socket.socket]:
    """For a command and its daemon: messages stay whole, whoever of the daemon's processes sends them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(TAKE_S, 0))
    return ours, theirs


def apart(
    first: Work[T],
    again: Callable[[], Work[T]],
    listener: Listener,
    name: str,
    *,
    staff: Callable[[], object],
    lost: str,
    let_go: Callable[[], object] = lambda: None,
) -> T:
    """What `first` gives, done in a process that outlives us. Raises what it raises.

    A keeper watches that process: when it is killed, another one does what `again` has given, which goes on from the
    journal; that is asked for once the first is at work, which need not wait for it. Raises Parked, with `lost` as its
    remedy, when both are gone. KeyboardInterrupt goes there as SIGINT; what comes of it is what is said there. What
    `staff` gives lives as long as one of the two does; `let_go` closes, in all other processes, what only `first` is
    to have.
    """
    ours, theirs = stream()

    def keep() -> None:
        ours.close()
        unplug()
        client = Client(theirs)
        try:
            _desk = staff()
        except LazyprocError as error:  # somebody else works on it
            client.failed(error)
            return
        worker = family.child(lambda: _do(first, client), name)
        let_go()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # is the worker's
        go_on = again()
        for _ in range(ATTEMPTS):
            if os.WIFEXITED(os.waitpid(worker, 0)[1]):
                return
            worker = family.child(lambda: _do(go_on, client), name)
        os.waitpid(worker, 0)

    with ours:
        with theirs:
            keeper = family.daemon(keep, f"{name}-keeper")
        let_go()
        with _passing_on(keeper):
            value: T = result(ours, listener, lost=lost)
            return value


def crew() -> dict[str, int]:
    """Who works on it, called in the work itself: for `sessions` and `abort`."""
    return {"server_pid": os.getpid(), "keeper_pid": os.getppid()}


def _do(work: Work[T], client: Client) -> None:
    try:
        client.done(work(client))
    except (Exception, KeyboardInterrupt) as error:
        client.failed(error)


def unplug() -> None:
    """The terminal is the command's: signals by default, nothing read, nothing written."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)


@contextmanager
def _passing_on(keeper: int) -> Iterator[None]:
    """What is to stop us stops the work, as far as it can be stopped: nothing is raised here. Signals that are ignored
    (nohup(1)) stay ignored, and only the main thread may set handlers.
    """

    def pass_on(_number: int, _frame: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(keeper, signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {sig: signal.getsignal(sig) for sig in SIGNALS}
    try:
        for sig, action in before.items():
            if action is not signal.SIG_IGN:
                signal.signal(sig, pass_on)
        yield
    finally:
        for sig, action in before.items():
            signal.signal(sig, action)


def result(stream: socket.socket, listener: Listener, *, lost: str) -> Any:
    """What the work gives. Raises what it has raised; Parked, with the remedy `lost`, when it ends without a word."""
    messages = Messages(stream)
    while (message := messages.read()) is not None:
        kind, value = message
        if kind == "event":
            listener(value)
        elif kind == "failed":
            raise value
        else:
            return value
    raise Parked("the processes that did the work are gone", where="this host", remedy=lost)
