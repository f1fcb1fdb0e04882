"""A lazy restore whose pages come from CRIU's page server, over a connection that outlives the restore.

The connection must not end before every page is here: its end is that of the source, or lets it run on (criu_source).
So a process of its own has it, which is not ours to kill. When the restore is killed the source goes on standing still,
and `lazyproc resume` gets its pages.
"""

from __future__ import annotations

import gc
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from lazyproc.errors import ConnectionLost, LazyprocError, Parked
from lazyproc.kernel import family
from lazyproc.migrate.apart import unplug
from lazyproc.migrate.desk import Desk, Request, ask, is_staffed
from lazyproc.pages.criu_source import CriuServer, LazyRuns, ServedPages
from lazyproc.pages.criu_translator import Translator
from lazyproc.pages.images import ImagePages
from lazyproc.uffd.pager import Pager

NAME = "lazyproc-criu"
ROLE = "criu"  # of its desk
ENDS = ("urgent", "bulk", "control")
FINISH, RESET = b"finish", b"reset"
WORDS = 1000  # bytes


class CriuSupply:
    """CRIU's server: what lazyproc.restore.run calls Served. A context manager.

    It is dialled when the images have been read, and before anything is built: it takes one client. Until the tree runs
    here (`runs`) the source runs on when the context is left.
    """

    def __init__(self, dial: Callable[[], CriuServer], session: str) -> None:
        self._dial = dial
        self._session = session
        self._server: CriuServer | None = None
        self._lazy: LazyRuns | None = None
        self._control: socket.socket | None = None
        self.runs = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._control is not None:
            with suppress(OSError):
                if not self.runs:
                    self._control.send(RESET)
            self._control.close()
        elif self._server is not None:
            self._server.reset()

    def pages(self, images: ImagePages) -> ServedPages:
        """What has to be there before the tree runs. Raises ConnectionLost, PermissionDenied, UsageError."""
        self._lazy = LazyRuns(images)
        self._server = self._dial()
        return ServedPages(images, self._lazy, self._server)

    def begin(self, pager: Pager, images: ImagePages) -> None:
        """The others come to the pager from now on."""
        assert self._lazy is not None, "the pages are known"
        assert self._server is not None, "and it was dialled"
        pairs = [socket.socketpair(), socket.socketpair(), _packets()]
        daemon = _Daemon(self._session, self._server, self._lazy, [far for _, far in pairs])
        family.daemon(daemon.run, NAME)
        for _, far in pairs:
            far.close()
        self._server.let_go()
        urgent, bulk, self._control = (near for near, _ in pairs)
        pager.serve_segments(self._lazy.beside(images))
        pager.serve_remote(urgent.detach(), bulk.detach())

    def finish(self) -> None:
        """Every page is here: the source may end. Raises ConnectionLost when it may not have heard it."""
        assert self._control is not None, "it has begun"
        finish(self._control, self._session)

    def lost(self, root_pid: int, missing: int, reason: str) -> LazyprocError:
        """When no page comes any more."""
        assert self._control is not None, "it has begun"
        said = _last_words(self._control) or reason
        return Parked(
            f"CRIU's page server is lost ({said}); up to {missing} pages are missing, and who touches one waits",
            where=f"pid {root_pid}",
            remedy=f"complete it from images with lazyproc resume {self._session} --from DIR, give them up with "
            f"--poison, or end it with lazyproc abort {self._session}",
        )


def finish(control: socket.socket, session: str) -> None:
    """See CriuSupply.finish; `control` is closed."""
    with control:
        with suppress(OSError):
            control.send(FINISH)
        said = _last_words(control)
    if said != FINISH.decode():
        raise ConnectionLost(
            f"every page is here, but CRIU may not know it ({said or 'the connection is gone'})",
            where=f"session {session}",
            remedy="see whether the process is still there, and end it: it runs here",
        )


def is_held(session: str) -> bool:
    """Whether the connection of a restore that was killed is still there."""
    return is_staffed(session, ROLE)


def attach(session: str) -> tuple[int, int, socket.socket]:
    """For a pager in the place of one that was killed: urgent, bulk, and what `finish` takes. Raises ConnectionLost."""
    pairs = [socket.socketpair(), socket.socketpair(), _packets()]
    try:
        for name, (_, far) in zip(ENDS, pairs, strict=True):
            answer = ask(session, ROLE, {"do": name}, far.fileno())
            if answer is None or "error" in answer:
                raise ConnectionLost("CRIU's page server is lost", where=session)
    finally:
        for _, far in pairs:
            far.close()
    urgent, bulk, control = (near for near, _ in pairs)
    return urgent.detach(), bulk.detach(), control


def let_source_run(session: str) -> None:
    """The tree of this session has been ended here."""
    ask(session, ROLE, {"do": RESET.decode()})


def _packets() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _last_words(control: socket.socket) -> str:
    try:
        return control.recv(WORDS).decode()
    except OSError:
        return ""


class _Daemon:
    """The server's connection on one side, a pager and whoever has it on the other."""

    def __init__(self, session: str, server: CriuServer, lazy: LazyRuns, ends: list[socket.socket]) -> None:
        self._session = session
        self._server = server
        self._translator = Translator(server, lazy)
        self._ends = dict(zip(ENDS, ends, strict=True))

    def run(self) -> None:
        gc.disable()  # rubbish of the process that we were would close numbers that are ours now
        unplug()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        family.keep_only(self._server.fileno(), *(each.fileno() for each in self._ends.values()))
        control = self._connect()
        desk = Desk(self._session, ROLE)
        while True:
            try:
                heard = self._step(control, desk)
            except LazyprocError as error:
                self._translator.disconnect()
                with suppress(OSError):
                    control.send(str(error).encode()[:WORDS])
                return
            if heard is None:
                return
            control = heard

    def _connect(self) -> socket.socket:
        urgent, bulk, control = (self._ends.pop(name) for name in ENDS)
        self._translator.connect(urgent, bulk)
        return control

    def _step(self, control: socket.socket, desk: Desk) -> socket.socket | None:
        """Who is to be heard from now on; None when all is over."""
        heard = [control.fileno()] if control.fileno() >= 0 else []
        ready = self._translator.step([desk.fileno(), *heard])
        if control.fileno() in ready:
            return self._hear(control)
        if desk.fileno() in ready and (request := desk.next()) is not None:
            return self._take_end(control, request)
        return control

    def _hear(self, control: socket.socket) -> socket.socket | None:
        """Who says nothing any more was killed: another one will come."""
        try:
            said = control.recv(WORDS)
        except OSError:
            said = b""
        if said == FINISH:
            self._translator.finish()
            control.send(FINISH)
            return None
        if said == RESET:
            self._server.reset()
            return None
        self._translator.disconnect()
        control.close()
        return control

    def _take_end(self, control: socket.socket, request: Request) -> socket.socket | None:
        name = request.fields.get("do")
        if name == RESET.decode():
            self._server.reset()
            request.answer({})
            return None
        try:
            if name not in ENDS:
                raise ValueError("no such end")
            self._ends[name] = request.take_socket()
        except (OSError, ValueError) as error:
            request.answer({"error": f"not understood: {error}"})
            return control
        request.answer({})
        if len(self._ends) < len(ENDS):
            return control
        self._translator.disconnect()
        control.close()
        return self._connect()
