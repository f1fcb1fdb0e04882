"""Waiting for a moment of a migration, and doing something right then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lazyproc.hosts import Host, Pair
from lazyproc.wire.frame import HEADER
from lazyproc.wire.native import Role
from tests.faults.campaign.cases import AtBytes, AtFrame, AtJournal
from tests.faults.helpers import journals
from tests.live.bad_luck import way_to
from tests.live.moving import Receiver

PAUSE_S = 0.0002


@dataclass(slots=True)
class Trap:
    """Does `action` once. `sprung` is set when that is done, whatever came of it."""

    action: Callable[[], None]
    error: Exception | None = None
    begun: threading.Event = field(default_factory=threading.Event)
    sprung: threading.Event = field(default_factory=threading.Event)

    def spring(self) -> None:
        if not self.begun.is_set():
            self.begun.set()
            try:
                self.action()
            except Exception as error:
                self.error = error
            self.sprung.set()


class Frames:
    """The frames that one direction of a connection has carried, by their headers."""

    def __init__(self) -> None:
        self._rest = b""
        self._skip = 0
        self.control = False

    def types(self, data: bytes) -> Iterator[int]:
        """Of the frames that begin in `data`; of HELLO only whether it is a control connection's."""
        self._rest += data
        while True:
            skipped = min(self._skip, len(self._rest))
            self._rest, self._skip = self._rest[skipped:], self._skip - skipped
            if self._skip or len(self._rest) < HEADER.size:
                return
            kind, _, _, count, *_ = HEADER.unpack_from(self._rest)
            self._rest, self._skip = self._rest[HEADER.size :], count
            yield kind


@contextmanager
def frame_trap(pair: Pair, receiver: Receiver, moment: AtFrame, trap: Trap) -> Iterator[str]:
    """An address at the source that leads to the receiver; the trap is sprung before the frame is passed on."""
    directions = Frames(), Frames()

    def watch(direction: int, number: int, data: bytes) -> bytes:
        if number == CONTROL and not trap.begun.is_set() and moment.type in directions[direction].types(data):
            trap.spring()
        return data

    def there(number: int, data: bytes) -> bytes:
        return watch(0, number, data)

    def back(number: int, data: bytes) -> bytes:
        return watch(1, number, data)

    with way_to(receiver, pair.source, there=there, back=back) as address:
        yield address


CONTROL = tuple(Role).index(Role.CONTROL)


def await_journal(pair: Pair, moment: AtJournal, over: Callable[[], bool]) -> bool:
    """Whether it was seen before it was `over`."""
    host = pair.source if moment.role == "source" else pair.destination
    while not over():
        if any(record.get("state") == moment.state for record in journals(host, moment.role)):
            return True
        time.sleep(PAUSE_S)
    return False


def await_bytes(host: Host, moment: AtBytes, over: Callable[[], bool]) -> bool:
    while not over():
        if bytes_received(host) >= moment.count:
            return True
        time.sleep(PAUSE_S)
    return False


def bytes_received(host: Host) -> int:
    """By its eth0, since that is there (proc_pid_net(5))."""
    for line in Path(f"/proc/{host.init_pid}/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "eth0":
            return int(figures.split()[0])
    raise AssertionError("no eth0")
