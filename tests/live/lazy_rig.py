"""Both ends of a pager for tests: processes whose memory is missing, and a page server that does as it is told."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazyproc.kernel import sys as kernel
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.pages.server import crc32c
from lazyproc.trace import Fault, decode
from lazyproc.uffd.pager import Pager

ROOT = Path(__file__).parents[2]
HEADER = struct.Struct("<BBHIQQII")
GET, PAGES = 1, 2
ZERO, LAST, ABSENT, UNDER_WAY = 1, 2, 4, 8
DEADLINE = 20.0

TASK = MemoryObject(ObjectKind.TASK, 100)
SHARED = MemoryObject(ObjectKind.SHARED, 7)


def content(pages: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(pages * PAGE)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Child:
    """A process running lazy_child.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.live.lazy_child"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._numbers = iter(range(1 << 30))
        self._pending: dict[int, Future[Any]] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            future = self._pending.pop(answer["number"])
            if "error" in answer:
                future.set_exception(RuntimeError(answer["error"]))
            else:
                future.set_result(answer["result"])

    def begin(self, name: str, **arguments: Any) -> Future[Any]:
        """Starts a command; it may block until the test lets it go on."""
        assert self.process.stdin is not None
        number, future = next(self._numbers), Future[Any]()
        self._pending[number] = future
        self.process.stdin.write(
            json.dumps({"number": number, "name": name, "arguments": arguments}).encode() + b"\n"
        )
        self.process.stdin.flush()
        return future

    def call(self, name: str, **arguments: Any) -> Any:
        return self.begin(name, **arguments).result(DEADLINE)

    def register(self, *ranges: tuple[int, int]) -> int:
        """Our descriptor of a userfaultfd over the ranges. The child keeps none: the pager's is the only one."""
        theirs = self.call("register", ranges=ranges)
        pidfd = kernel.pidfd_open(self.process.pid)
        try:
            return kernel.pidfd_getfd(pidfd, theirs)
        finally:
            os.close(pidfd)
            self.call("close", fd=theirs)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


@contextmanager
def child() -> Iterator[Child]:
    process = Child()
    try:
        yield process
    finally:
        process.close()


@dataclass
class Asked:
    channel: str
    obj: int
    addr: int
    count: int


@dataclass
class Server:
    """A page server in Python. `hold` addresses are not answered before `release`; `asked` are the GETs so far.

    `answer` makes the frames of one page; replace it to send garbage.
    """

    objects: dict[int, tuple[int, bytes]]  # key -> first address, content
    asked: queue.Queue[Asked] = field(default_factory=queue.Queue)
    log: list[Asked] = field(default_factory=list)
    _held: dict[tuple[str, int], threading.Event] = field(default_factory=dict)
    _threads: list[threading.Thread] = field(default_factory=list)
    _sockets: list[socket.socket] = field(default_factory=list)

    def page(self, key: int, addr: int) -> bytes | None:
        start, data = self.objects.get(key, (0, b""))
        offset = addr - start
        return data[offset : offset + PAGE] if 0 <= offset < len(data) else None

    def frames(self, key: int, addr: int, tag: int, last: bool) -> bytes:
        page = self.page(key, addr)
        flags = LAST if last else 0
        if page is None or not any(page):
            flags |= ABSENT if page is None else ZERO
            return HEADER.pack(PAGES, flags, 0, 1, key, addr, tag, 0)
        return HEADER.pack(PAGES, flags, 0, 1, key, addr, tag, crc32c(page)) + page

    def connect(self) -> tuple[int, int]:
        """The pager's ends of an urgent and a bulk connection."""
        return self._channel("urgent"), self._channel("bulk")

    def _channel(self, name: str) -> int:
        ours, theirs = socket.socketpair()
        self._sockets.append(ours)
        thread = threading.Thread(target=self._serve, args=(name, ours), daemon=True)
        self._threads.append(thread)
        thread.start()
        return theirs.detach()

    def hold(self, channel: str, addr: int) -> threading.Event:
        """Answers to GETs of that page wait until the returned event is set."""
        return self._held.setdefault((channel, addr), threading.Event())

    def wait_for(self, channel: str, addr: int) -> Asked:
        """Waits until that page has been asked for."""
        while True:
            asked = self.asked.get(timeout=DEADLINE)
            if asked.channel == channel and asked.addr <= addr < asked.addr + asked.count * PAGE:
                return asked

    def hang_up(self) -> None:
        for ours in self._sockets:
            with suppress(OSError):  # it has hung up itself
                ours.shutdown(socket.SHUT_RDWR)

    def _serve(self, name: str, ours: socket.socket) -> None:
        with ours, ours.makefile("rb") as stream:
            try:
                while len(header := stream.read(HEADER.size)) == HEADER.size:
                    self._answer(name, ours, header)
            except OSError:  # the pager hung up
                return

    def _answer(self, name: str, ours: socket.socket, header: bytes) -> None:
        kind, _, _, count, key, addr, tag, _ = HEADER.unpack(header)
        assert kind == GET
        asked = Asked(name, key, addr, count)
        self.log.append(asked)
        self.asked.put(asked)
        pages = [addr + index * PAGE for index in range(count)]
        for page in pages:
            if (name, page) in self._held:
                self._held[name, page].wait(DEADLINE)
        for page in pages:
            ours.sendall(self.frames(key, page, tag, page == pages[-1]))

    def close(self) -> None:
        for event in self._held.values():
            event.set()
        self.hang_up()
        for thread in self._threads:
            thread.join(DEADLINE)


@contextmanager
def server(objects: dict[int, tuple[int, bytes]]) -> Iterator[Server]:
    pages = Server(objects)
    try:
        yield pages
    finally:
        pages.close()


@contextmanager
def pager(**options: Any) -> Iterator[Pager]:
    """A pager whose userfaultfds are closed at the end, so that whoever waits is let go."""
    with Pager(**options) as made:
        try:
            yield made
        finally:
            made.abandon()


def faults(made: Pager) -> list[Fault]:
    """The faults of the trace since the last call. Who was woken may run before its fault is written down, but not
    before the lock that `counters` takes is free again.
    """
    made.counters()
    return [fault for records, _lost in made.trace() for fault in decode(records)]


def whole(addr: int, pages: int) -> list[Extent]:
    return [Extent(addr, pages, lazy=True)]


@dataclass
class Rig:
    """One child with `pages` missing private pages at `addr`, and a server that has them."""

    child: Child
    server: Server
    pager: Pager
    space: int
    addr: int
    pages: int
    data: bytes

    @property
    def length(self) -> int:
        return self.pages * PAGE

    def at(self, page: int) -> int:
        return self.addr + page * PAGE

    def expect(self, first: int, count: int) -> str:
        return digest(self.data[first * PAGE : (first + count) * PAGE])

    def start(self, *, bulk: bool = False, known: bool = True, max_rate: int = 0) -> None:
        self.pager.serve_remote(*self.server.connect())
        if known:
            self.pager.apply_map({TASK: whole(self.addr, self.pages)})
        self.pager.start(bulk=bulk, max_rate=max_rate)

    def finish_in_bulk(self) -> None:
        assert self.pager.wait(DEADLINE)
        assert balanced(self.pager)


def held_read(r: Rig, page: int) -> tuple[threading.Event, Future[Any]]:
    """A thread of the child waits for `page`, which the server withholds until the event is set."""
    held = r.server.hold("urgent", r.at(page))
    reading = r.child.begin("digest", addr=r.at(page), length=PAGE)
    r.server.wait_for("urgent", r.at(page))
    return held, reading


def balanced(made: Pager) -> bool:
    counters = made.counters()
    return counters.total == counters.settled


@contextmanager
def rig(pages: int = 16, *, zero: frozenset[int] = frozenset(), **options: Any) -> Iterator[Rig]:
    with child() as process, pager(**options) as made:
        addr = process.call("mmap", length=pages * PAGE)
        data = b"".join(bytes(PAGE) if page in zero else content(1, seed=page + 1) for page in range(pages))
        with server({TASK.key: (addr, data)}) as source:
            space = made.add_space(process.register((addr, pages * PAGE)))
            made.add_region(space, addr, pages * PAGE, TASK, addr)
            yield Rig(process, source, made, space, addr, pages, data)
