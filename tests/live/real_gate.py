"""A way to the receiver that falls silent at a chosen message of the hand-over."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from lazyproc.hosts import Host
from tests.live.moving import Receiver
from tests.live.real import network_of


@dataclass(slots=True)
class Gate:
    """A way to the receiver that swallows what it says from its `closes_at`-th message on, until it is opened.

    The two sides talk in turns on the first connection, so one message is one read: 1 WELCOME, 2 PREPARED,
    3 BUILT, 4 COMMITTED.
    """

    closes_at: int
    address: str
    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def carry(self, listener: socket.socket, host: Host, target: tuple[str, int]) -> None:
        """Join three connections, as they come, with the receiver at `target`."""
        with ExitStack() as stack:
            pumps = []
            for number in range(3):
                try:
                    near = stack.enter_context(listener.accept()[0])
                except OSError:
                    break  # whoever was to come gave up
                with network_of(host):
                    far = stack.enter_context(socket.create_connection(target))
                for one, other, closes_at in (
                    (near, far, 0),
                    (far, near, self.closes_at if number == 0 else 0),
                ):
                    pumps.append(threading.Thread(target=self._pump, args=(one, other, closes_at)))
                    pumps[-1].start()
            for pump in pumps:
                pump.join()

    def _pump(self, one: socket.socket, other: socket.socket, closes_at: int) -> None:
        """Until one of them hangs up; then both are told."""
        count = 0
        with suppress(OSError):
            while data := one.recv(1 << 20):
                count += 1
                if count == closes_at:
                    self.reached.set()
                    self.opened.wait()
                other.sendall(data)
        for sock in (one, other):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def gate_to(receiver: Receiver, host: Host, closes_at: int) -> Iterator[Gate]:
    """A gate on `host` (its loopback interface) to a receiver; opened at the end."""
    name, _, port = receiver.address.rpartition(":")
    with network_of(host):
        listener = socket.create_server(("127.0.0.1", 0))
    gate = Gate(closes_at, f"127.0.0.1:{listener.getsockname()[1]}")
    thread = threading.Thread(target=gate.carry, args=(listener, host, (name, int(port))))
    thread.start()
    try:
        yield gate
    finally:
        gate.opened.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
