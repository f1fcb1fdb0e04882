"""`lazyproc-criu dump --lazy-pages`: a frozen process gives its pages to CRIU, and to lazyproc."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest

from lazyproc.hosts import Pair
from lazyproc.images.convert import from_images, memory_objects
from lazyproc.images.files import Folder
from lazyproc.model import PAGE, Extent
from lazyproc.pages.criu_source import LazyRuns
from lazyproc.pages.images import ImagePages
from lazyproc.wire.criu import Status
from tests.faults.helpers import SOURCE, journals, sessions
from tests.interop.criu_hosts import END_S, Criu, criu, restored_by_criu, running_there
from tests.live.criu_client import CriuClient
from tests.live.moving import INSECURE, run_cli
from tests.live.programs import Program, stands_still, wait_until
from tests.live.real import network_of

PORT = 7000
MIB = 16


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running_there(pair.source, "mixed", MIB, 3, 500, directory=pair.shared) as it:
        it.watch.wait_beats()
        yield it


@contextmanager
def dumping(pair: Pair, program: Program, *options: object) -> Iterator[tuple[Path, Criu]]:
    """The images are there, and clients may come."""
    images = pair.shared / "images"
    images.mkdir()
    words = ("--tree", pair.source.vpid(program.pid), "--lazy-pages", "--insecure", *at(pair), *options)
    with ours(pair.source, images, "dump", *words) as dump:
        yield images, dump


def at(pair: Pair) -> tuple[object, ...]:
    return "--address", pair.source.address, "--port", PORT


ours = partial(criu, command=(sys.executable, "-m", "lazyproc.criu.main"))
Daemon = Callable[..., AbstractContextManager[Criu]]


@pytest.mark.parametrize("daemon", [criu, ours])
def test_criu_restores_it(daemon: Daemon, pair: Pair, program: Program) -> None:
    work = pair.shared / "work"
    work.mkdir()
    insecure = ("--insecure",) if daemon is ours else ()
    with (
        dumping(pair, program) as (images, dump),
        daemon(
            pair.destination, images, "lazy-pages", "--page-server", *at(pair), *insecure, work=work
        ) as lazy,
        restored_by_criu(pair.destination, images, "--lazy-pages", work=work) as pid,
    ):
        program.watch.wait_beats()
        lazy.finish()
        dump.finish()
        assert program.process.wait(END_S) == -signal.SIGKILL
        program.watch.wait_beats()
        os.kill(pid, signal.SIGTERM)
        program.watch.wait_ended()


def test_lazyproc_restores_it(pair: Pair, program: Program) -> None:
    with dumping(pair, program) as (images, dump):
        server = f"{pair.source.address}:{PORT}"
        words = ("restore", "--lazy", "-D", images, "--from", server, "--detach", "--json", *INSECURE)
        pid = pair.destination.pid(json.loads(run_cli(pair.destination, *words).stdout)["root_pid"])
        dump.finish()
        assert program.process.wait(END_S) == -signal.SIGKILL
        program.watch.wait_beats()
        os.kill(pid, signal.SIGTERM)
        program.watch.wait_ended()


@contextmanager
def client(pair: Pair) -> Iterator[CriuClient]:
    with network_of(pair.destination):
        sock = socket.create_connection((str(pair.source.address), PORT), END_S)
    with CriuClient(sock) as it:
        yield it


def is_closed(pair: Pair) -> bool:
    try:
        with client(pair):
            return False
    except ConnectionRefusedError:
        return True


def lazy_runs(images: Path) -> Iterator[tuple[int, Extent]]:
    """(vpid, extent) of what the images say is at the server."""
    folder = Folder(images)
    with ImagePages(folder, memory_objects(from_images(folder.read()))) as pages:
        for obj, extents in LazyRuns(pages).extents().items():
            for extent in extents:
                yield obj.id, extent


def test_who_gets_no_page_changes_nothing(pair: Pair, program: Program) -> None:
    """A scan, garbage, our own protocol, GET of what is not there, CLOSE without a GET; then an interrupt."""
    with dumping(pair, program) as (images, dump):
        vpid, run = next(lazy_runs(images))
        for said in (b"", b"GET / HTTP/1.0\r\n" + bytes(40), bytes(32)):
            with client(pair) as stranger:
                stranger.sock.sendall(said)
        run_cli(
            pair.destination,
            "restore",
            "--lazy",
            "--from",
            f"{pair.source.address}:{PORT}",
            *INSECURE,
            expected=1,
        )
        with client(pair) as early:
            assert early.get(vpid + 1, run.addr, 1) == b""
            assert early.close_in_order() == Status(0)
        assert stands_still(program)
        dump.process.send_signal(signal.SIGINT)
        assert dump.process.wait(END_S) == 1
        assert "interrupted" in dump.errors()
        assert not Folder(images).images()
    unharmed(pair, program)


def test_a_killed_dump_lets_it_run_on(pair: Pair, program: Program) -> None:
    with dumping(pair, program) as (images, dump):
        (journal,) = journals(pair.source, SOURCE)
        os.kill(pair.source.pid(journal["server_pid"]), signal.SIGKILL)
        assert dump.process.wait(END_S) == 1
        assert not Folder(images).images()
    unharmed(pair, program)


def unharmed(pair: Pair, program: Program) -> None:
    assert sessions(pair.source) == []
    program.watch.wait_beats()
    program.stop_and_verify()


@pytest.mark.parametrize("end", ["reset", "close in order", "we are killed"])
def test_once_a_page_is_given_it_is_parked(end: str, pair: Pair, program: Program) -> None:
    with dumping(pair, program) as (images, dump):
        vpid, run = next(lazy_runs(images))
        with client(pair) as it:
            assert len(it.get(vpid, run.addr, 1)) == PAGE
            (session,) = sessions(pair.source)
            assert session["state"] == "parked"
            wait_until(lambda: is_closed(pair), "nobody else is let in")
            if end == "we are killed":
                os.kill(pair.source.pid(journals(pair.source, SOURCE)[0]["server_pid"]), signal.SIGKILL)
            elif end == "close in order":
                assert it.close_in_order() == Status(0)
            elif end == "reset":
                it.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            dump.process.send_signal(signal.SIGINT)
        assert dump.process.wait(END_S) == 1
    assert session["id"] in dump.errors()
    assert stands_still(program)
    (session,) = sessions(pair.source)
    assert session["state"] == "orphaned"
    run_cli(pair.source, "resume", session["id"], expected=2)
    run_cli(pair.source, "resume", session["id"], "--here", expected=2)
    run_cli(pair.source, "resume", session["id"], "--here", "--force")
    unharmed(pair, program)
