"""`lazyproc serve` as CRIU's page server: what its client may say, and what strangers say."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lazyproc.facts import replace
from lazyproc.hosts import Pair
from lazyproc.images.convert import from_images
from lazyproc.images.files import Folder
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.pages.criu_server import MAX_PAGES
from lazyproc.pages.images import ImagePages
from lazyproc.wire.criu import Dialect, Status
from tests.faults.hostile import Listener, listening
from tests.live.criu_client import CriuClient
from tests.live.moving import INSECURE, checkpoint
from tests.live.programs import running


@pytest.fixture
def images(pair: Pair) -> Path:
    """Of a process whose memory has holes; it runs on."""
    folder = pair.shared / "images"
    with running("memory_random", 8, directory=pair.shared, host=pair.source) as it:
        checkpoint(pair.source, it.pid, folder, "--leave-running")
    return folder


@pytest.fixture
def server(pair: Pair, images: Path) -> Iterator[Listener]:
    with listening(pair.source, "serve", "-D", images, *INSECURE) as it:
        yield it


@contextmanager
def client(pair: Pair, server: Listener, dialect: Dialect = Dialect.V4_2) -> Iterator[CriuClient]:
    with CriuClient(server.dial_from(pair.destination)(), dialect) as it:
        yield it


class Expected:
    """The pages of the only process in `images`."""

    def __init__(self, images: Path) -> None:
        folder = Folder(images)
        checkpoint = from_images(folder.read())
        self.obj = MemoryObject(ObjectKind.TASK, checkpoint.root.vpid)
        self.pages = ImagePages(folder, [self.obj])
        self.extents = self.pages.extents()[self.obj]

    @property
    def vpid(self) -> int:
        return self.obj.id

    def read(self, addr: int, count: int) -> bytes:
        return self.pages.read(self.obj, addr, count)

    def before_a_hole(self) -> Extent:
        """The longest run: neighbours are joined as the server does, however the mappings lie this time."""
        runs: list[Extent] = []
        for extent in self.extents:
            if runs and runs[-1].end == extent.addr:
                runs[-1] = replace(runs[-1], count=runs[-1].count + extent.count)
            else:
                runs.append(extent)
        return max(runs, key=lambda run: run.count)


@pytest.mark.parametrize("dialect", Dialect)
def test_pages_come_as_they_are(pair: Pair, images: Path, server: Listener, dialect: Dialect) -> None:
    expected = Expected(images)
    run = expected.before_a_hole()
    with client(pair, server, dialect) as it:
        assert it.get(expected.vpid, run.addr, 1) == expected.read(run.addr, 1)
        assert run.count > MAX_PAGES, "longer than an answer may be"
        assert it.get(expected.vpid, run.addr, run.count) == expected.read(run.addr, MAX_PAGES)
        last = run.end - PAGE
        assert it.get(expected.vpid, last, 300) == expected.read(last, 1), "no further than the run"
        assert it.close_in_order() == Status(0)


def test_a_page_that_is_not_there_is_not_the_end(pair: Pair, images: Path, server: Listener) -> None:
    expected = Expected(images)
    run = expected.before_a_hole()
    with client(pair, server) as it:
        assert it.get(expected.vpid, run.end, 1) == b""
        assert it.get(expected.vpid + 1, run.addr, 1) == b"", "of no process of these"
        assert it.get(expected.vpid, run.addr, 1) == expected.read(run.addr, 1)


def test_one_dies_in_the_middle_and_comes_again(pair: Pair, images: Path, server: Listener) -> None:
    expected = Expected(images)
    run = expected.before_a_hole()
    with client(pair, server) as it:
        it.ask(expected.vpid, run.addr, run.count)
        it.sock.recv(100)
    with client(pair, server) as one, client(pair, server) as other:
        for each in (one, other):
            assert each.get(expected.vpid, run.addr, 1) == expected.read(run.addr, 1)


@pytest.mark.parametrize(
    "said",
    [b"", bytes(32), b"GET / HTTP/1.1\r\nHost: me\r\n\r\n", b"\x04" + bytes(31), b"\x06\0\x04\0" + bytes(40)],
    ids=["nothing", "zeros", "http", "a dump", "pages"],
)
def test_strangers(pair: Pair, images: Path, server: Listener, said: bytes) -> None:
    expected = Expected(images)
    run = expected.before_a_hole()
    with client(pair, server) as it:
        assert it.get(expected.vpid, run.addr, 1)
        for _ in range(20):
            with server.dial_from(pair.destination)() as stranger:
                stranger.sendall(said)
        with server.dial_from(pair.destination)() as stranger:
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(20)
            with suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
        assert it.get(expected.vpid, run.addr, 1) == expected.read(run.addr, 1)
    assert server.process.poll() is None


def test_nobody_is_let_in_unasked(pair: Pair, images: Path) -> None:
    """From another host, without TLS or --insecure."""
    with listening(pair.source, "serve", "-D", images) as server, client(pair, server) as it:
        assert it.hung_up()
