"""The page server against a real, stopped process, over real sockets."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import zstandard

from lazyproc.errors import ImageError, NoSuchProcess, UsageError
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.pages.frozen import FrozenPages, Place, without_overlaps
from lazyproc.pages.server import PageServer, ServerCounters, crc32c

GET, PAGES, CLOSE = 1, 2, 3
ZERO, LAST, ABSENT, UNDER_WAY, PACKED = 1, 2, 4, 8, 16
HEADER = struct.Struct("<BBHIQQII")
MADV_GUARD_INSTALL = 102  # Linux 6.13
TASK = MemoryObject(ObjectKind.TASK, 42)
libc = ctypes.CDLL(None, use_errno=True)


# --- a process that stands still ------------------------------------------------------------------------


@contextmanager
def stopped_child(prepare: Callable[[], None] = lambda: None) -> Iterator[int]:
    """A copy of this process that has run `prepare` and stopped."""
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(1)
    try:
        _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the child could not prepare itself: {status}"
        yield pid
    finally:
        kill(pid)


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


@dataclass
class Memory:
    """A mapping of this process, which a child inherits."""

    data: mmap.mmap

    @property
    def addr(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.data))

    def expected(self, addr: int, count: int) -> bytes:
        return self.data[addr - self.addr : addr - self.addr + count * PAGE]


def memory(pages: int) -> Memory:
    """Content, runs of zeros, single zero pages, and pages that differ from zero in one byte only."""
    rng = random.Random(pages)
    data = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    index = 0
    while index < pages:
        run = min(rng.choice((1, 1, 2, 7, 100)), pages - index)
        kind = rng.choice(("content", "content", "zero", "first", "last"))
        for page in range(index, index + run):
            if kind == "content":
                data[page * PAGE : (page + 1) * PAGE] = rng.randbytes(PAGE)
            elif kind != "zero":
                data[page * PAGE + (PAGE - 1 if kind == "last" else 0)] = 1
        index += run
    return Memory(data)


# --- the other end --------------------------------------------------------------------------------------


@dataclass
class Part:
    flags: int
    addr: int
    count: int
    data: bytes


class Client:
    """Speaks the page frames byte for byte as docs/protocol.md has them."""

    def __init__(self, server: PageServer, name: str = "urgent", *, tcp: bool = False) -> None:
        self.sock, theirs = connected_pair() if tcp else socket.socketpair()
        self.sock.settimeout(20)
        server.serve(theirs.detach(), name)

    def ask(self, addr: int, count: int, tag: int = 7, key: int = TASK.key, *, flags: int = 0) -> None:
        self.sock.sendall(HEADER.pack(GET, flags, 0, count, key, addr, tag, 0))

    def answer(self, addr: int, count: int, tag: int = 7, key: int = TASK.key) -> list[Part]:
        """Checks that the frames cover the range in order and that the checksums are right."""
        parts: list[Part] = []
        at = addr
        while at < addr + count * PAGE:
            header = HEADER.unpack(self.exactly(HEADER.size))
            flags, pages, crc = header[1], header[3], header[7]
            assert header == (PAGES, flags, 0, pages, key, at, tag, crc)
            assert not flags & ~(ZERO | LAST | ABSENT | UNDER_WAY | PACKED)
            if flags & PACKED:
                (length,) = struct.unpack("<I", self.exactly(4))
                data = zstandard.decompress(self.exactly(length), pages * PAGE)
            else:
                data = b"" if flags & (ZERO | ABSENT | UNDER_WAY) else self.exactly(pages * PAGE)
            assert crc == (crc32c(data) if data else 0)
            at += pages * PAGE
            assert bool(flags & LAST) == (at == addr + count * PAGE)
            parts.append(Part(flags & ~LAST, at - pages * PAGE, pages, data))
        return parts

    def read(self, addr: int, count: int) -> bytes:
        """Zeros for what is zero; nothing may be absent."""
        self.ask(addr, count)
        parts = self.answer(addr, count)
        assert not any(part.flags & ABSENT for part in parts)
        return b"".join(part.data or bytes(part.count * PAGE) for part in parts)

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.sock.recv(count - len(data))
            assert part, "the server has hung up"
            data += part
        return data

    def is_hung_up_on(self) -> bool:
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True


def connected_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


@contextmanager
def serving(pid: int, addr: int, pages: int) -> Iterator[tuple[FrozenPages, PageServer]]:
    place = Place(TASK, addr, addr + pages * PAGE, pid, addr)
    extents = {TASK: (Extent(addr, pages, lazy=True),)}
    with FrozenPages([place], extents) as frozen, PageServer(frozen.segments()) as server:
        yield frozen, server


# --- what is served -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tcp", [False, True])
def test_every_page_of_a_stopped_process_arrives(tcp: bool) -> None:
    area = memory(700)
    with stopped_child() as pid, serving(pid, area.addr, 700) as (frozen, server):
        client = Client(server, tcp=tcp)
        assert client.read(area.addr, 700) == area.expected(area.addr, 700)
        assert frozen.read(TASK, area.addr, 700) == area.expected(area.addr, 700)
        for page in (0, 1, 63, 64, 65, 699):
            assert client.read(area.addr + page * PAGE, 1) == area.expected(area.addr + page * PAGE, 1)


def test_zero_pages_are_announced_and_counted_but_not_sent() -> None:
    area = memory(700)
    with stopped_child() as pid, serving(pid, area.addr, 700) as (_, server):
        client = Client(server)
        client.ask(area.addr, 700)
        parts = client.answer(area.addr, 700)
        for part in parts:
            pages = area.expected(part.addr, part.count)
            zero = [not any(pages[at : at + PAGE]) for at in range(0, len(pages), PAGE)]
            assert zero == [part.flags == ZERO] * part.count
        counters = server.counters()["urgent"]
        zeros = sum(part.count for part in parts if part.flags == ZERO)
        assert 0 < zeros < 700
        sent = sum(HEADER.size + len(part.data) for part in parts)
        assert counters == ServerCounters(1, 700 - zeros, zeros, 0, HEADER.size, sent)


def text(pages: int) -> Memory:
    """What compresses well, and a page in the middle that does not."""
    data = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data[:] = b"".join(b"line %06d\n." % number for number in range(pages * PAGE // 13 + 1))[: pages * PAGE]
    data[pages // 2 * PAGE : (pages // 2 + 1) * PAGE] = random.Random(1).randbytes(PAGE)
    return Memory(data)


def test_who_asks_for_it_gets_pages_compressed_where_that_is_shorter() -> None:
    area = text(700)
    with stopped_child() as pid, serving(pid, area.addr, 700) as (_, server):
        client = Client(server, "bulk")
        client.ask(area.addr, 700, flags=PACKED)
        parts = client.answer(area.addr, 700)
        assert b"".join(part.data for part in parts) == area.expected(area.addr, 700)
        assert {part.flags for part in parts} == {PACKED}
        assert server.counters()["bulk"].bytes_out < 700 * PAGE / 4
        client.ask(area.addr + 350 * PAGE, 1, flags=PACKED)
        assert [part.flags for part in client.answer(area.addr + 350 * PAGE, 1)] == [0]
        client.ask(area.addr, 700)
        assert {part.flags for part in client.answer(area.addr, 700)} == {0}


def test_two_channels_at_once_and_pipelined_requests_in_order() -> None:
    area = memory(1024)
    with stopped_child() as pid, serving(pid, area.addr, 1024) as (_, server):
        urgent, bulk = Client(server, "urgent", tcp=True), Client(server, "bulk", tcp=True)
        failures: list[BaseException] = []

        def stream() -> None:
            try:
                for _ in range(8):
                    assert bulk.read(area.addr, 1024) == area.expected(area.addr, 1024)
            except BaseException as failure:
                failures.append(failure)

        thread = threading.Thread(target=stream)
        thread.start()
        for batch in range(20):
            for tag in range(50):
                urgent.ask(area.addr + (batch * 50 + tag) * PAGE, 1, tag)
            for tag in range(50):
                addr = area.addr + (batch * 50 + tag) * PAGE
                (part,) = urgent.answer(addr, 1, tag)
                assert (part.data or bytes(PAGE)) == area.expected(addr, 1)
        thread.join()
        assert not failures
        assert server.counters()["urgent"].requests == 1000
        assert server.counters()["bulk"].requests == 8


def test_a_request_may_arrive_in_any_pieces() -> None:
    area = memory(4)
    with stopped_child() as pid, serving(pid, area.addr, 4) as (_, server):
        client = Client(server)
        requests = b"".join(
            HEADER.pack(GET, 0, 0, 1, TASK.key, area.addr + page * PAGE, page, 0) for page in range(4)
        )
        for at in range(0, len(requests), 7):
            client.sock.sendall(requests[at : at + 7])
        for page in range(4):
            (part,) = client.answer(area.addr + page * PAGE, 1, tag=page)
            assert (part.data or bytes(PAGE)) == area.expected(area.addr + page * PAGE, 1)


def test_pages_without_read_permission_arrive_and_impossible_ones_are_absent() -> None:
    area = memory(200)
    start = area.addr
    area.data[10 * PAGE : 40 * PAGE] = random.Random(1).randbytes(30 * PAGE)

    def prepare() -> None:
        def call(name: str, page: int, pages: int, *args: int) -> None:
            length = ctypes.c_size_t(pages * PAGE)
            if getattr(libc, name)(ctypes.c_void_p(start + page * PAGE), length, *args):
                raise OSError(ctypes.get_errno(), name)

        call("mprotect", 10, 5, 0)
        call("madvise", 20, 2, MADV_GUARD_INSTALL)
        call("munmap", 30, 3)

    with stopped_child(prepare) as pid, serving(pid, start, 200) as (frozen, server):
        client = Client(server)
        client.ask(start, 200)
        gone: set[int] = set()
        for part in client.answer(start, 200):
            if part.flags == ABSENT:
                gone |= {(part.addr - start) // PAGE + page for page in range(part.count)}
            else:
                data = part.data or bytes(part.count * PAGE)
                assert data == area.expected(part.addr, part.count)
        assert gone == {20, 21, 30, 31, 32}
        assert server.counters()["urgent"].absent == 5
        assert frozen.read(TASK, start + 10 * PAGE, 5) == area.expected(start + 10 * PAGE, 5)
        with pytest.raises(ImageError):
            frozen.read(TASK, start + 19 * PAGE, 4)


def test_what_no_segment_has_is_absent() -> None:
    area = memory(100)
    places = [
        Place(TASK, area.addr + first * PAGE, area.addr + end * PAGE, 0, area.addr + first * PAGE)
        for first, end in ((10, 20), (20, 21), (90, 100))
    ]
    with (
        stopped_child() as pid,
        FrozenPages([place._replace(pid=pid) for place in places], {}) as frozen,
        PageServer(frozen.segments()) as server,
    ):
        client = Client(server)
        client.ask(area.addr - PAGE, 102)
        parts = client.answer(area.addr - PAGE, 102)
        absent = [((part.addr - area.addr) // PAGE, part.count) for part in parts if part.flags == ABSENT]
        assert absent == [(-1, 11), (21, 69), (100, 1)]
        client.ask(area.addr, 5, key=TASK.key + 256)
        assert [part.flags for part in client.answer(area.addr, 5, key=TASK.key + 256)] == [ABSENT]
        with pytest.raises(ImageError):
            frozen.read(TASK, area.addr + 20 * PAGE, 2)


def test_files_and_processes_side_by_side() -> None:
    """A shared object at two places of its file, one of which the file is too short for."""
    area = memory(30)
    shared = MemoryObject(ObjectKind.SHARED, 3)
    with tempfile.TemporaryFile() as image, stopped_child() as pid:
        image.write(bytes(5 * PAGE) + area.expected(area.addr, 30))
        image.flush()
        place = Place(TASK, area.addr, area.addr + 30 * PAGE, pid, area.addr)
        with (
            FrozenPages([place], {}) as frozen,
            PageServer(
                [
                    (shared.key, 0, 10 * PAGE, image.fileno(), 5 * PAGE),
                    (shared.key, 10 * PAGE, 40 * PAGE, image.fileno(), 15 * PAGE),
                    *frozen.segments(),
                ]
            ) as server,
        ):
            client = Client(server)
            client.ask(0, 40, key=shared.key)
            parts = client.answer(0, 40, key=shared.key)
            content = b"".join(part.data or bytes(part.count * PAGE) for part in parts)
            assert content[: 30 * PAGE] == area.expected(area.addr, 30)
            assert sum(part.count for part in parts if part.flags == ABSENT) == 10
            assert client.read(area.addr, 30) == area.expected(area.addr, 30)


# --- how it ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        (GET, 0, 0, 0, TASK.key, 0, 0, 0),
        (GET, 0, 0, 1025, TASK.key, 0, 0, 0),
        (GET, 0, 0, 2**32 - 1, TASK.key, 0, 0, 0),
        (GET, 0, 0, 1, TASK.key, 1, 0, 0),
        (GET, 0, 0, 2, TASK.key, 2**64 - PAGE, 0, 0),
        (GET, 1, 0, 1, TASK.key, 0, 0, 0),
        (GET, 0, 1, 1, TASK.key, 0, 0, 0),
        (GET, 0, 0, 1, TASK.key, 0, 0, 1),
        (PAGES, 0, 0, 1, TASK.key, 0, 0, 0),
        (17, 0, 0, 0, 0, 0, 0, 0),
        (0, 0, 0, 0, 0, 0, 0, 0),
    ],
)
def test_a_bad_request_ends_its_connection_and_no_other(frame: tuple[int, ...]) -> None:
    area = memory(8)
    with stopped_child() as pid, serving(pid, area.addr, 8) as (_, server):
        good, bad = Client(server, "good"), Client(server, "bad")
        bad.sock.sendall(HEADER.pack(*frame))
        assert bad.is_hung_up_on()
        assert server.ended("bad") == f"the client sent a bad request (frame type {frame[0]})"
        assert server.counters()["bad"].pages == 0
        assert good.read(area.addr, 8) == area.expected(area.addr, 8)
        assert server.ended("good") is None


def test_close_hanging_up_and_serving_a_name_again() -> None:
    area = memory(8)
    with stopped_child() as pid, serving(pid, area.addr, 8) as (_, server):
        first = Client(server)
        first.read(area.addr, 8)
        first.sock.sendall(HEADER.pack(CLOSE, 0, 0, 0, 0, 0, 0, 0))
        assert first.is_hung_up_on()
        assert server.ended("urgent") == "the client closed it"
        second = Client(server)
        second.read(area.addr, 8)
        assert server.ended("urgent") is None
        second.sock.shutdown(socket.SHUT_WR)
        assert second.is_hung_up_on()
        assert server.ended("urgent") == "the client hung up without saying so"
        assert server.counters()["urgent"].requests == 2


def test_a_process_that_ends_is_not_taken_for_zeros_or_holes() -> None:
    area = memory(8)
    with stopped_child() as pid, serving(pid, area.addr, 8) as (frozen, server):
        client = Client(server)
        client.read(area.addr, 8)
        kill(pid)
        client.ask(area.addr, 8)
        assert client.is_hung_up_on()
        assert server.ended("urgent") == f"pid {pid}, whose pages were asked for, has ended"
        with pytest.raises(NoSuchProcess, match=str(pid)):
            frozen.read(TASK, area.addr, 1)


def test_stop_ends_a_client_that_does_not_read() -> None:
    area = memory(1024)
    with stopped_child() as pid, serving(pid, area.addr, 1024) as (_, server):
        client = Client(server, tcp=True)
        idle = Client(server, "idle")
        for _ in range(100):
            client.ask(area.addr, 1024)
        client.exactly(1)  # it is in the middle of an answer
        server.stop()
        assert idle.is_hung_up_on()
        assert server.ended("urgent") is not None
        assert 0 < server.counters()["urgent"].bytes_out < 400 << 20


def test_reconnecting_keeps_neither_threads_nor_descriptors() -> None:
    area = memory(1)
    with stopped_child() as pid, serving(pid, area.addr, 1) as (_, server):
        before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        for _ in range(50):
            client = Client(server)
            client.read(area.addr, 1)
            client.sock.close()
        server.stop()
        assert (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))) == before


# --- the tables -----------------------------------------------------------------------------------------


def test_overlapping_places_are_cut() -> None:
    shared = MemoryObject(ObjectKind.SHARED, 1)
    places = [
        Place(shared, 4 * PAGE, 10 * PAGE, 2, 0x2000),
        Place(shared, 0, 6 * PAGE, 1, 0x1000),
        Place(shared, PAGE, 3 * PAGE, 3, 0x3000),
    ]
    assert without_overlaps(places) == [
        Place(shared, 0, 6 * PAGE, 1, 0x1000),
        Place(shared, 6 * PAGE, 10 * PAGE, 2, 0x2000 + 2 * PAGE),
    ]


@pytest.mark.parametrize(
    "rows",
    [
        [(1, 0, 2 * PAGE, 0, 0), (1, PAGE, 3 * PAGE, 0, 0)],
        [(1, 1, PAGE, 0, 0)],
        [(1, PAGE, PAGE, 0, 0)],
        [(1, 0, PAGE, 0, 7)],
    ],
)
def test_a_bad_table_is_refused(rows: list[tuple[int, int, int, int, int]]) -> None:
    with pytest.raises(UsageError):
        PageServer(rows)


def test_a_process_that_does_not_exist() -> None:
    with pytest.raises(NoSuchProcess):
        FrozenPages([Place(TASK, 0, PAGE, 2**22 + 1, 0)], {})


def test_crc32c_is_castagnoli() -> None:
    def reference(data: bytes) -> int:
        crc = 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        return crc ^ 0xFFFFFFFF

    assert reference(b"123456789") == 0xE3069283
    data = random.Random(5).randbytes(3 * PAGE)
    assert crc32c(data) == reference(data)
    assert crc32c(bytes(PAGE)) == reference(bytes(PAGE))


def test_throughput_for_the_eye(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints, asserts only the content: 64 MiB over loopback, then single pages."""
    pages = 16384
    area = Memory(mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    area.data[:] = random.Random(2).randbytes(1 << 20) * (pages * PAGE >> 20)
    with stopped_child() as pid, serving(pid, area.addr, pages) as (_, server):
        client = Client(server, tcp=True)
        into = memoryview(bytearray(pages * PAGE + pages // 64 * HEADER.size))
        began = time.perf_counter()
        for page in range(0, pages, 1024):
            client.ask(area.addr + page * PAGE, 1024)
        at = 0
        while at < len(into):
            at += client.sock.recv_into(into[at:])
        bulk = time.perf_counter() - began
        assert into[HEADER.size : HEADER.size + 64 * PAGE] == area.expected(area.addr, 64)
        began = time.perf_counter()
        for page in range(2000):
            client.ask(area.addr + page * PAGE, 1)
            client.exactly(HEADER.size + PAGE)
        single = time.perf_counter() - began
    with capsys.disabled():
        rate, delay = pages * PAGE / bulk / 1e9, single / 2000 * 1e6
        print(f"\n  page server: {rate:.2f} GB/s, {delay:.1f} us a single page")


# --- pages that are freed as they are acknowledged ----------------------------------------------------------


@contextmanager
def releasing(pid: int, addr: int, pages: int) -> Iterator[PageServer]:
    place = Place(TASK, addr, addr + pages * PAGE, pid, addr)
    with FrozenPages([place], {}) as frozen, PageServer(frozen.segments(), releasing=True) as server:
        yield server


def flags_of(client: Client, addr: int, count: int) -> list[tuple[int, int]]:
    client.ask(addr, count)
    return [(part.flags, part.count) for part in client.answer(addr, count)]


def test_what_is_on_its_way_over_one_channel_is_not_sent_over_the_other() -> None:
    area = memory(200)
    area.data[: 200 * PAGE] = random.Random(2).randbytes(200 * PAGE)
    with stopped_child() as pid, releasing(pid, area.addr, 200) as server:
        urgent, bulk = Client(server, "urgent"), Client(server, "bulk")
        assert urgent.read(area.addr + 70 * PAGE, 1) == area.expected(area.addr + 70 * PAGE, 1)
        assert flags_of(bulk, area.addr + 64 * PAGE, 64) == [(0, 6), (UNDER_WAY, 1), (0, 57)]
        assert flags_of(urgent, area.addr + 80 * PAGE, 1) == [(UNDER_WAY, 1)]
        assert (server.counters()["urgent"].under_way, server.counters()["bulk"].under_way) == (1, 1)
        assert server.counters()["bulk"].pages == 63


def test_what_is_asked_for_again_over_the_same_channel_is_sent_again() -> None:
    """Who asked could not put it anywhere."""
    area = memory(4)
    area.data[: 4 * PAGE] = random.Random(3).randbytes(4 * PAGE)
    with stopped_child() as pid, releasing(pid, area.addr, 4) as server:
        urgent, bulk = Client(server, "urgent"), Client(server, "bulk")
        for _ in range(2):
            assert urgent.read(area.addr, 4) == area.expected(area.addr, 4)
        assert flags_of(bulk, area.addr, 4) == [(UNDER_WAY, 4)]
        assert bulk.read(area.addr, 4) == area.expected(area.addr, 4)


def test_what_was_released_is_under_way_on_its_own_link_and_an_error_on_the_next() -> None:
    area = memory(4)
    area.data[: 4 * PAGE] = random.Random(4).randbytes(4 * PAGE)
    with stopped_child() as pid, releasing(pid, area.addr, 4) as server:
        urgent, bulk = Client(server, "urgent"), Client(server, "bulk")
        assert urgent.read(area.addr, 2) == area.expected(area.addr, 2)
        assert server.release(TASK, area.addr, 2) == 2
        for client in (bulk, urgent):
            assert flags_of(client, area.addr, 2) == [(UNDER_WAY, 2)]
        server.new_link()
        assert urgent.is_hung_up_on()
        assert bulk.is_hung_up_on()
        assert server.freed_and_asked_for() is None
        urgent = Client(server, "urgent")
        assert urgent.read(area.addr + 2 * PAGE, 2) == area.expected(area.addr + 2 * PAGE, 2)
        urgent.ask(area.addr, 4)
        assert urgent.is_hung_up_on()
        assert server.freed_and_asked_for() == area.addr
        assert "is freed here" in str(server.ended("urgent"))


def test_a_release_of_what_the_server_does_not_have() -> None:
    area = memory(4)
    with stopped_child() as pid, releasing(pid, area.addr, 4) as server:
        assert server.release(TASK, area.addr - PAGE, 6) == 4
        assert server.release(TASK, area.addr + 4 * PAGE, 1) == 0
        assert server.release(MemoryObject(ObjectKind.SHARED, 3), area.addr, 1) == 0
