"""A process that carries the bytes of one connection between TLS and a socket pair, so that nobody else knows TLS.

Threads in C that never take the GIL read and write the plain end as they would a TCP connection. The relay has a GIL
of its own, belongs to no terminal and to no session: it lives as long as its connection.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import ssl
import time
from contextlib import suppress

from lazyproc.errors import LazyprocError
from lazyproc.kernel import family

NAME = "lazyproc-relay"
CHUNK = 256 << 10  # bytes under way in one direction
RECORD = 16 << 10  # what one SSL_read gives at most (RFC 8446, 5.1)
LINGER_S = 5.0  # the last bytes are on their way; who closes with something unread sends RST after them


def relayed(far: ssl.SSLSocket) -> socket.socket:
    """The plain end of a connection whose handshake is over. `far` is the relay's from now on.

    A fork, since an established TLS session cannot be taken through exec(2). The child uses nothing that a thread of
    ours could have locked: it imports nothing, and glibc and OpenSSL make fork(2) safe for themselves.
    """
    near, its = socket.socketpair()
    try:
        family.daemon(lambda: _be_relay(far, its), NAME)
    except OSError as error:
        near.close()
        raise LazyprocError(
            f"no process can be made: {error.strerror}", where=NAME, remedy="see `ulimit -u`"
        ) from error
    finally:
        its.close()
        os.close(far.detach())  # without a word to the other end
    return near


def _be_relay(far: ssl.SSLSocket, near: socket.socket) -> None:
    gc.disable()  # rubbish of the process that we were would close numbers that are ours now
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    family.keep_only(far.fileno(), near.fileno())
    Relay(far, near).run()


class _Flow:
    """One direction: at most one buffer is under way, so who writes faster than the other end reads has to wait."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(CHUNK))
        self.start = self.end = 0  # what is still to be written
        self.ended = False  # nothing will come any more
        self.passed_on = False  # and the other side knows it

    @property
    def pending(self) -> bool:
        return self.start < self.end

    @property
    def wants(self) -> bool:
        return not self.pending and not self.ended

    def drain(self, sock: socket.socket) -> None:
        """Write until all is written, or it would wait (BlockingIOError, ssl.SSLWantWriteError)."""
        while self.pending:
            self.start += sock.send(self.view[self.start : self.end])
        self.start = self.end = 0


class Relay:
    """`run` ends when both directions have, or when either side is gone; both sockets are closed then."""

    def __init__(self, far: ssl.SSLSocket, near: socket.socket) -> None:
        self._far = far
        self._near = near
        self._inward, self._outward = _Flow(), _Flow()

    def run(self) -> None:
        with self._far, self._near:
            self._far.setblocking(False)
            self._near.setblocking(False)
            with suppress(OSError):  # one side is gone: closing tells the other
                self._carry()
                self._part()

    def _carry(self) -> None:
        inward, outward = self._inward, self._outward
        while not (inward.passed_on and outward.passed_on):
            far, near = self._wait()
            if near & select.POLLHUP and outward.passed_on:  # nobody reads what would come
                return
            if far:
                self._receive()
            if near:
                self._take()
            self._pass_on_ends()

    def _wait(self) -> tuple[int, int]:
        """What is ready, as poll(2) has it. A side of which nothing is wanted would be ready without end."""
        inward, outward = self._inward, self._outward
        poll = select.poll()
        far = select.POLLIN * inward.wants | select.POLLOUT * outward.pending
        near = select.POLLIN * outward.wants | select.POLLOUT * inward.pending
        if far:
            poll.register(self._far, far)
        if near or outward.passed_on:
            poll.register(self._near, near)
        ready = dict(poll.poll(0 if inward.wants and self._far.pending() else None))
        decrypted = select.POLLIN if inward.wants and self._far.pending() else 0
        return ready.get(self._far.fileno(), 0) | decrypted, ready.get(self._near.fileno(), 0)

    def _receive(self) -> None:
        """From the network; and onto it, when there is room again."""
        flow = self._inward
        if flow.wants:
            try:
                while flow.end < CHUNK:
                    count = self._far.recv_into(flow.view[flow.end :])
                    flow.end += count
                    flow.ended = not count
                    if count < RECORD:  # whoever waits for this gets it before we look for more
                        break
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                pass
            except ssl.SSLZeroReturnError:  # an end that comes after ours, where recv_into does not give 0
                flow.ended = True
            except OSError:
                self._deliver()
                raise
        self._deliver()
        self._send()

    def _take(self) -> None:
        """From our side; and to it, when there is room again."""
        flow = self._outward
        if flow.wants:
            with suppress(BlockingIOError):
                flow.end = self._near.recv_into(flow.view)
                flow.ended = not flow.end
        self._send()
        self._deliver()

    def _deliver(self) -> None:
        with suppress(BlockingIOError):
            self._inward.drain(self._near)

    def _send(self) -> None:
        with suppress(ssl.SSLWantWriteError, ssl.SSLWantReadError):
            self._outward.drain(self._far)

    def _pass_on_ends(self) -> None:
        """An end of one direction leaves the other as it is."""
        if self._inward.ended and not self._inward.pending and not self._inward.passed_on:
            self._inward.passed_on = True
            self._near.shutdown(socket.SHUT_WR)
        if self._outward.ended and not self._outward.pending and not self._outward.passed_on:
            self._outward.passed_on = True
            with suppress(ssl.SSLError):  # the answer to close_notify has not come, or data has come instead
                self._far.unwrap()

    def _part(self) -> None:
        """What was sent arrives, whatever the other end is still sending."""
        self._far.shutdown(socket.SHUT_WR)
        until = time.monotonic() + LINGER_S
        while (left := until - time.monotonic()) > 0 and select.select([self._far], [], [], left)[0]:
            if not self._far.recv(CHUNK):
                return
