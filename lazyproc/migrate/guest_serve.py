"""`qemu-serve`: a guest, saved or running, for a QEMU that waits for post-copy; nothing of ours is at that end.

In order: look at the guest, connect, say what RAM there is and that all of it is missing, the devices and the word to
run, then pages: what the guest waits for first, what lies around that, and the rest behind it.
"""

from __future__ import annotations

import math
import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TypeAlias, TypeVar

from lazyproc.errors import ConnectionLost, LazyprocError, Parked, ProtocolError, UsageError
from lazyproc.events import Listener, PagesMoved, StateChanged, ignore
from lazyproc.facts import dataclass
from lazyproc.images.files import Folder
from lazyproc.images.sums import check_sums
from lazyproc.kernel.deaf import deaf
from lazyproc.kernel.ready import readable
from lazyproc.migrate.guest_dial import ANSWER_S, demand_fit, dialled
from lazyproc.migrate.guest_look import looked_at
from lazyproc.migrate.guest_records import desk_for, ways_on
from lazyproc.migrate.guest_source import demand_stopped, demand_unchanged
from lazyproc.migrate.guest_watch import watched
from lazyproc.migrate.held_guest import HeldGuest
from lazyproc.pages.images import ImagePages
from lazyproc.pages.peer import Trust
from lazyproc.pages.tls import Tls
from lazyproc.qemu import devices, saved, stream
from lazyproc.qemu.guest import Guest
from lazyproc.qemu.postcopy import PagesLeft
from lazyproc.qemu.qmp import Qmp
from lazyproc.qemu.ram import Block
from lazyproc.qemu.stream import Event, Pong, Received, Resumed, ReturnPath, Shut, Wanted

PIECE = 1 << 16
TELL_S = 0.1  # between two words to the listener, which may take its time for each
# A guest that comes to life waits for one page after the other, and each would stand behind what nobody waits for: that
# goes when the guest has waited for nothing for a while, or has lived for a while.
QUIET_S, ALIVE_S = 0.02, 0.5
_E = TypeVar("_E", bound=Event)
_Talks: TypeAlias = "AbstractContextManager[Sequence[Talk]]"


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
    listener: Listener = ignore,
) -> GuestServed:
    """The guest in the folder `source`, a Path, or behind the QMP monitor `source`, a str, for the QEMU that waits at
    `target` (HOST:PORT or unix:PATH) with the capability postcopy-ram; returns when that has every page.

    A running guest is stopped, and QEMU here quits in the end; until the word to run is sent it goes on here after any
    error. With `recover` the guest runs there already and has lost its source (QMP migrate-recover); with `preempt`
    QEMU there has the capability postcopy-preempt, and what its guest waits for goes by a connection of its own. Raises
    UsageError, PermissionDenied, ImageError, CannotBeDone before it connects: the QEMU there waits on; ConnectionLost,
    ProtocolError; Parked when its guest may run there by then.
    """
    talks = talks_with([target], Trust(insecure, tls=tls), preempt)
    if isinstance(source, Path):
        return _from_folder(source, talks, recover, listener)
    return _from_guest(source, talks, recover, listener)


@contextmanager
def talks_with(targets: Sequence[str], trust: Trust, preempt: bool) -> Iterator[Sequence[Talk]]:
    """Connected to each, when none is to be refused. Raises UsageError, ConnectionLost, PermissionDenied."""
    for target in targets:
        demand_fit(target, trust)
    with ExitStack() as stack:

        def dial(target: str) -> Talk:
            count = 2 if preempt else 1
            return Talk([stack.enter_context(closing(dialled(target, trust))) for _ in range(count)], target)

        yield [dial(target) for target in targets]


@contextmanager
def opened(directory: Path) -> Iterator[tuple[saved.Saved, ImagePages]]:
    """A saved guest. Raises ImageError."""
    folder = Folder(directory)
    images = folder.read()
    check_sums(images)
    found = saved.read(images)
    with ImagePages(folder, [block.object for block in found.blocks]) as pages:
        yield found, pages


def _from_folder(directory: Path, talks: _Talks, recover: bool, listener: Listener) -> GuestServed:
    with ExitStack() as stack:
        found, pages = stack.enter_context(opened(directory))
        left = PagesLeft(found.blocks, pages.extents(), pages)
        (talk,) = stack.enter_context(talks)
        if not recover:
            talk.begin(found.machine, found.blocks)
        with recoverable_from(directory):
            talk.recover(found.blocks, left) if recover else talk.run(found.devices)
            return talk.serve(left, listener)


def _from_guest(monitor: str, talks: _Talks, recover: bool, listener: Listener) -> GuestServed:
    with ExitStack() as last, ExitStack() as stack:
        qmp = stack.enter_context(Qmp(monitor))
        guest = looked_at(qmp, again=recover)
        held = HeldGuest(guest)
        _demand_state(guest, recover)
        (talk,) = stack.enter_context(talks)
        if not recover:
            talk.begin(guest.machine, guest.blocks)
        journal = last.enter_context(desk_for(guest, talk.target))
        called_off = _nothing if recover else journal.remove  # what was recorded before holds on
        gone = stack.enter_context(watched(qmp, held, called_off))
        state = b"" if recover else devices.saved(qmp, guest.machine)
        pages = stack.enter_context(held.open())
        left = PagesLeft(guest.blocks, held.extents(), pages)
        demand_unchanged(qmp, guest)
        demand_stopped(qmp)
        journal.write("parked", durable=False)  # it does not survive a power failure, and nor does QEMU
        gone.set()
        with _recoverable(monitor, "it stays stopped here", ways_on(journal.session, guest.qmp)):
            talk.recover(guest.blocks, left) if recover else talk.run(state)
            report = talk.serve(left, listener)
            last.enter_context(deaf())  # nothing is missing any more
        stack.close()
        held.end()
        journal.remove()
    return report


def recoverable_from(directory: Path) -> AbstractContextManager[None]:
    """Inside, the guest of the folder may run at the other end: an error or an interrupt is Parked, also what the
    listener raises (a full disk).
    """
    source = f"-D {directory}"
    ways = (
        f"use migrate-recover there, and lazyproc qemu-serve {source} --to ... --recover; or begin anew in another "
        "QEMU, without what the guest has done there"
    )
    return _recoverable(source, "its images are as they were", ways)


@contextmanager
def _recoverable(source: str, here: str, ways: str) -> Iterator[None]:
    try:
        yield
    except (LazyprocError, OSError, KeyboardInterrupt) as error:
        raise Parked(
            f"the guest may run there, and misses pages ({str(error) or 'interrupted'}); {here}",
            where=source,
            remedy=ways,
        ) from error


def _demand_state(guest: Guest, recover: bool) -> None:
    if recover and guest.running:
        raise UsageError("the guest runs here", where=guest.qmp, remedy="leave out --recover")
    if not recover and not guest.running:
        raise UsageError(
            "the guest is paused, and may run elsewhere", where=guest.qmp,
            remedy="continue it first (cont), or let another QEMU go on with it by --recover",
        )  # fmt: skip


def _nothing() -> None: ...


def _moved(left: PagesLeft) -> PagesMoved:
    return PagesMoved(left.total, left.urgent + left.bulk, left.zero, left.urgent, left.bulk, 0)


class Talk:
    """A QEMU that takes a guest in. What its guest waits for goes by the last of the connections, everything else by
    the first; QEMU tells them apart by their order. `bytes` is what went.
    """

    def __init__(self, socks: Sequence[socket.socket], target: str) -> None:
        self._sock, self._fast = socks[0], socks[-1]
        self.target = target
        self._path = ReturnPath()
        self._events: deque[Event] = deque()
        self._started = time.monotonic()
        self._run_ms = 0.0
        self._ran = self._asked = -math.inf  # when it was told to run, and last waited for a page
        self._loaded = False
        self.bytes = 0
        for sock in socks:
            sock.settimeout(ANSWER_S)

    def begin(self, machine: str, blocks: Sequence[Block]) -> None:
        """What comes, and that the other end understands it. Raises ConnectionLost, ProtocolError."""
        self._send(stream.begins(machine, blocks))
        self._expect(Pong)
        if self._preempts:
            self._demand_fast()

    def _demand_fast(self) -> None:
        """Before the guest waits for pages by it. Without the capability QEMU stops listening once it has run out of
        what was sent (migration/socket.c, socket_accept_incoming_migration): so what comes later tells.
        """
        self._send(stream.ping())
        self._expect(Pong)
        if readable([self._fast.fileno()], 0):
            raise ConnectionLost(
                "QEMU takes no second connection",
                where=self.target,
                remedy="set its capability postcopy-preempt as well, or leave out --preempt",
            )

    @property
    def _preempts(self) -> bool:
        return self._fast is not self._sock

    def run(self, state: bytes) -> None:
        """From here on the guest may run there."""
        self._send(stream.runs(state))
        self._ran = self._asked = time.monotonic()
        self._run_ms = (self._ran - self._started) * 1e3

    def hang_up(self) -> None:
        """Whoever talks meanwhile, in another thread, gets a ConnectionLost."""
        for sock in {self._sock, self._fast}:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

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
        more, told = True, time.monotonic()
        while more or left.waited_for or not self._loaded:
            more = self._step(left, more)
            if (now := time.monotonic()) - told >= TELL_S:
                told = now
                listener(_moved(left))
        listener(_moved(left))
        if self._preempts:
            self._send(stream.END_OF_RAM, self._fast)
        self._send(stream.ends())
        shut = self._expect(Shut)
        if shut.error:
            raise ConnectionLost(f"QEMU there has failed ({shut.error})", where=self.target)
        total_ms = (time.monotonic() - self._started) * 1e3
        return GuestServed(self.target, left.urgent, left.bulk, left.zero, self.bytes, self._run_ms, total_ms)

    def _step(self, left: PagesLeft, more: bool) -> bool:
        """What can be read now, and sent; whether there is `more` then that nobody waits for."""
        rest = self._rest_s() if more else ANSWER_S
        ready = self._ready(rest, sends=left.waited_for or rest <= 0)
        if ready & ~select.POLLOUT:
            self._receive()
            self._hear(left)
        while records := left.next_urgent():  # at once: only UNSENT bytes may stand before it
            self._send(records if self._preempts else stream.part(records), self._fast)
        if not ready & select.POLLOUT:
            return more
        if records := left.next_likely():
            self._send(stream.part(records))
        elif rest <= 0:
            if not (records := left.next_bulk()):
                return False
            self._send(stream.part(records))
        return more

    def _rest_s(self) -> float:
        """Seconds until something goes that nobody waits for."""
        return min(self._ran + ALIVE_S, self._asked + QUIET_S) - time.monotonic()

    def _ready(self, rest: float, *, sends: bool) -> int:
        """What of poll(2) is so within `rest` seconds; who `sends` waits as long as it takes."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | (select.POLLOUT if sends else 0))
        patience = ANSWER_S if sends else rest
        if ready := poll.poll(patience * 1e3):
            return ready[0][1]
        if patience >= ANSWER_S:
            raise ConnectionLost("QEMU there takes nothing", where=self.target)
        return 0

    def _hear(self, left: PagesLeft) -> None:
        while self._events:
            event = self._events.popleft()
            if isinstance(event, Wanted):
                self._asked = time.monotonic()
                left.want(event)
            elif isinstance(event, Pong):
                self._loaded = True
            else:
                what = type(event).__name__
                raise ProtocolError(f"{what} from a QEMU that misses pages", where=self.target)

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
                raise ConnectionLost(f"QEMU there has given up ({event.error})", where=self.target)
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
            return ConnectionLost(f"QEMU is lost: {why}", where=self.target)
        return ConnectionLost(
            f"no QEMU that takes a guest in by post-copy: {why}",
            where=self.target,
            remedy="see what it says, whether it has the capability postcopy-ram, and with postcopy-preempt use "
            "--preempt",
        )
