"""`qemu-serve`: a guest, saved or running, for a QEMU that waits for post-copy; nothing of ours is at that end.

In order: connect, say what RAM there is and that all of it is missing, the devices and the word to run, then pages:
what the guest waits for first, the rest behind it.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TypeVar

from lazyproc.errors import ConnectionLost, LazyprocError, Parked, ProtocolError, UsageError
from lazyproc.events import Listener, PagesMoved, StateChanged
from lazyproc.facts import dataclass
from lazyproc.images.files import Folder
from lazyproc.images.sums import check_sums
from lazyproc.kernel.ready import readable
from lazyproc.migrate.guest_source import looked_at, standing
from lazyproc.migrate.held_guest import HeldGuest
from lazyproc.pages.images import ImagePages
from lazyproc.pages.peer import Trust
from lazyproc.pages.relay import relayed
from lazyproc.pages.tls import Tls, handshaken
from lazyproc.pages.transport import connect, parse_address
from lazyproc.qemu import devices, saved, stream
from lazyproc.qemu.guest import Guest
from lazyproc.qemu.postcopy import PagesLeft
from lazyproc.qemu.qmp import Qmp
from lazyproc.qemu.ram import Block
from lazyproc.qemu.stream import Event, Pong, Received, Resumed, ReturnPath, Shut, Wanted

UNIX = "unix:"
UNSENT = 1 << 17  # bytes that may wait in front of a page that is waited for
ANSWER_S = 30.0
PIECE = 1 << 16
_E = TypeVar("_E", bound=Event)


@dataclass(frozen=True, slots=True)
class GuestServed:
    """What `qemu_serve` did; times in ms. `pages_zero`: asked for, and without content."""

    target: str
    pages_urgent: int
    pages_bulk: int
    pages_zero: int
    bytes_wire: int
    run_ms: float  # until the state of the devices had gone, with the word to run
    total_ms: float


def qemu_serve(
    source: Path | str,
    target: str,
    *,
    recover: bool = False,
    preempt: bool = False,
    insecure: bool = False,
    tls: Tls | None = None,
    listener: Listener,
) -> GuestServed:
    """The guest in the folder `source`, or behind the QMP monitor `source`, for the QEMU that waits at `target`
    (HOST:PORT or unix:PATH) with the capability postcopy-ram; returns when that has every page.

    A running guest is stopped, and QEMU here quits in the end; until the word to run is sent it goes on here after any
    error. With `recover` the guest runs there already and has lost its source (QMP migrate-recover); with `preempt`
    QEMU there has the capability postcopy-preempt, and what its guest waits for goes by a connection of its own. Raises
    UsageError, ImageError, CannotBeDone, ConnectionLost, ProtocolError; Parked when its guest may run there by then.
    """
    with ExitStack() as stack:
        trust = Trust(insecure, tls=tls)
        socks = [stack.enter_context(closing(_dialled(target, trust))) for _ in range(2 if preempt else 1)]
        talk = Talk(socks, target)
        if isinstance(source, Path) and source.is_dir():
            return _from_folder(source, talk, recover, listener)
        return _from_guest(str(source), talk, recover, listener)


def _from_folder(directory: Path, talk: Talk, recover: bool, listener: Listener) -> GuestServed:
    folder = Folder(directory)
    images = folder.read()
    check_sums(images)
    found = saved.read(images)
    with ImagePages(folder, [block.object for block in found.blocks]) as pages:
        left = PagesLeft(found.blocks, pages.extents(), pages)
        if not recover:
            talk.begin(found.machine, found.blocks)
        with _recoverable(f"-D {directory}", "its images are as they were"):
            talk.recover(found.blocks, left) if recover else talk.run(found.devices)
            return talk.serve(left, listener)


def _from_guest(monitor: str, talk: Talk, recover: bool, listener: Listener) -> GuestServed:
    with ExitStack() as stack:
        qmp = stack.enter_context(Qmp(monitor))
        guest = looked_at(qmp)
        held = HeldGuest(guest)
        _demand_state(guest, recover)
        if not recover:
            talk.begin(guest.machine, guest.blocks)
        gone = stack.enter_context(standing(qmp, held))
        state = b"" if recover else devices.saved(qmp, guest.machine)
        pages = stack.enter_context(held.open())
        left = PagesLeft(guest.blocks, held.extents(), pages)
        gone.set()
        with _recoverable(monitor, "it stays stopped here"):
            talk.recover(guest.blocks, left) if recover else talk.run(state)
            report = talk.serve(left, listener)
    held.end()
    return report


@contextmanager
def _recoverable(source: str, here: str) -> Iterator[None]:
    """Inside, the guest may run at the other end: an error or an interrupt is Parked."""
    try:
        yield
    except (LazyprocError, KeyboardInterrupt) as error:
        raise Parked(
            f"the guest may run there, and misses pages ({str(error) or 'interrupted'}); {here}",
            where=source,
            remedy=f"use migrate-recover there, and lazyproc qemu-serve {source} --to ... --recover; when it was "
            "lost before it ran there, let it go on here (cont)",
        ) from error


def _demand_state(guest: Guest, recover: bool) -> None:
    if recover and guest.running:
        raise UsageError("the guest runs here", where=guest.qmp, remedy="leave out --recover")
    if not recover and not guest.running:
        raise UsageError(
            "the guest is paused, and may run elsewhere", where=guest.qmp,
            remedy="continue it first (cont), or let another QEMU go on with it by --recover",
        )  # fmt: skip


def _dialled(target: str, trust: Trust) -> socket.socket:
    """TLS as QEMU has it: from byte 0. Raises UsageError, ConnectionLost, PermissionDenied."""
    if target.startswith(UNIX):
        if trust.tls is not None:
            raise UsageError("TLS is for HOST:PORT", where=target, remedy="leave out the --tls options")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(target.removeprefix(UNIX))
        except OSError as error:
            sock.close()
            raise ConnectionLost(
                f"nobody waits there ({error.strerror})",
                where=target,
                remedy="start QEMU with -incoming there",
            ) from error
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT)
        trust.check(sock)
        return sock
    sock = connect(target, ANSWER_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(ANSWER_S * 1e3))
    if trust.tls is None:
        trust.check(sock)
        return sock
    return relayed(handshaken(sock, trust.tls, parse_address(target)[0], target))


class Talk:
    """A QEMU that takes a guest in. What its guest waits for goes by the last of the connections, everything else by
    the first; QEMU tells them apart by their order. `bytes` is what went.
    """

    def __init__(self, socks: Sequence[socket.socket], target: str) -> None:
        self._sock, self._fast = socks[0], socks[-1]
        self._target = target
        self._path = ReturnPath()
        self._events: deque[Event] = deque()
        self._started = time.monotonic()
        self._run_ms = 0.0
        self._loaded = False
        self.bytes = 0
        for sock in socks:
            sock.settimeout(ANSWER_S)

    def begin(self, machine: str, blocks: Sequence[Block]) -> None:
        """What comes, and that the other end understands it. Raises ConnectionLost, ProtocolError."""
        self._send(stream.begins(machine, blocks))
        self._expect(Pong)
        self._demand_fast()

    def _demand_fast(self) -> None:
        """Before the guest waits for pages by it: without the capability QEMU has closed it by now."""
        if self._preempts and readable([self._fast.fileno()], 0):
            raise ConnectionLost(
                "QEMU takes no second connection",
                where=self._target,
                remedy="set its capability postcopy-preempt as well, or leave out --preempt",
            )

    @property
    def _preempts(self) -> bool:
        return self._fast is not self._sock

    def run(self, state: bytes) -> None:
        """From here on the guest may run there."""
        self._send(stream.runs(state))
        self._run_ms = (time.monotonic() - self._started) * 1e3

    def recover(self, blocks: Sequence[Block], left: PagesLeft) -> None:
        """After a loss of the connection: what is there does not go again."""
        for block in blocks:
            self._send(stream.asks_received(block))
            left.received(self._expect(Received))
        self._send(stream.resumes())
        self._expect(Resumed)
        self._loaded = True  # its monitor has answered since

    def serve(self, left: PagesLeft, listener: Listener) -> GuestServed:
        """Every page, and the end."""
        listener(StateChanged("running", time.monotonic()))
        self._hear(left)
        more = True
        while more or not self._loaded:
            more = self._step(left, more)
            listener(PagesMoved(left.total, left.urgent + left.bulk, left.zero, left.urgent, left.bulk, 0))
        if self._preempts:
            self._send(stream.END_OF_RAM, self._fast)
        self._send(stream.ends())
        shut = self._expect(Shut)
        if shut.error:
            raise ConnectionLost(f"QEMU there has failed ({shut.error})", where=self._target)
        total_ms = (time.monotonic() - self._started) * 1e3
        return GuestServed(
            self._target, left.urgent, left.bulk, left.zero, self.bytes, self._run_ms, total_ms
        )

    def _step(self, left: PagesLeft, more: bool) -> bool:
        """What can be read now, and sent if there is `more`; whether there is then."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | (select.POLLOUT if more else 0))
        ready = poll.poll(ANSWER_S * 1e3)
        if not ready:
            raise ConnectionLost("QEMU there takes nothing", where=self._target)
        if ready[0][1] & ~select.POLLOUT:
            self._receive()
            self._hear(left)
            more = True
        if self._preempts:
            while records := left.next_urgent():
                self._send(records, self._fast)
        if not ready[0][1] & select.POLLOUT:
            return more
        if records := left.next_urgent() or left.next_bulk():
            self._send(stream.part(records))
        return bool(records)

    def _hear(self, left: PagesLeft) -> None:
        while self._events:
            event = self._events.popleft()
            if isinstance(event, Wanted):
                left.want(event)
            elif isinstance(event, Pong):
                self._loaded = True
            else:
                what = type(event).__name__
                raise ProtocolError(f"{what} from a QEMU that misses pages", where=self._target)

    def _expect(self, kind: type[_E]) -> _E:
        """The next event of this kind; what is waited for meanwhile is kept for `_step`."""
        kept: list[Event] = []
        while True:
            while not self._events:
                self._receive()
            event = self._events.popleft()
            if isinstance(event, kind):
                self._events.extendleft(reversed(kept))
                return event
            if isinstance(event, Shut):
                raise ConnectionLost(f"QEMU there has given up ({event.error})", where=self._target)
            kept.append(event)

    def _receive(self) -> None:
        try:
            data = self._sock.recv(PIECE)
        except OSError as error:
            raise self._lost(error.strerror or "it does not answer") from error
        if not data:
            raise self._lost("it has hung up")
        self._events.extend(self._path.feed(data))

    def _send(self, data: bytes, sock: socket.socket | None = None) -> None:
        try:
            (sock or self._sock).sendall(data)
        except OSError as error:
            raise self._lost(error.strerror or "it takes nothing") from error
        self.bytes += len(data)

    def _lost(self, why: str) -> ConnectionLost:
        if self._run_ms or self._loaded:
            return ConnectionLost(f"QEMU is lost: {why}", where=self._target)
        return ConnectionLost(
            f"no QEMU that takes a guest in by post-copy: {why}",
            where=self._target,
            remedy="see what it says, whether it has the capability postcopy-ram, and with postcopy-preempt use "
            "--preempt",
        )
