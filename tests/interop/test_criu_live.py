"""`lazyproc-criu` and page servers between two hosts: CRIU at the other end, and lazyproc."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lazyproc.hosts import Pair, Trio
from lazyproc.images.convert import from_images, memory_objects
from lazyproc.images.files import Folder
from lazyproc.keys import make_keys
from lazyproc.model import PAGE, Extent
from lazyproc.pages.criu_source import LazyRuns
from lazyproc.pages.images import ImagePages
from lazyproc.wire.criu import Status
from tests.faults.helpers import SOURCE, gone, journals, kill, sessions
from tests.interop.criu_hosts import (
    END_S,
    Criu,
    argv,
    criu,
    large_pipes,
    restored_by_criu,
    run_criu,
    running_there,
)
from tests.live.criu_client import CriuClient
from tests.live.moving import INSECURE, restore, run_cli
from tests.live.programs import Program, stands_still, wait_until
from tests.live.real import network_of
from tests.live.test_bad_luck_moments import tables
from tests.live.test_tcp_close import dialled

PORT = 7000
MIB = 16


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running_there(pair.source, "mixed", MIB, 3, 500, directory=pair.shared) as it:
        it.watch.wait_beats()
        yield it


@contextmanager
def dumping(
    pair: Pair, root: Program | subprocess.Popen[Any], *options: object
) -> Iterator[tuple[Path, Criu]]:
    """The images are there, and clients may come."""
    images = pair.shared / "images"
    images.mkdir()
    words = ("--tree", pair.source.vpid(root.pid), "--lazy-pages", "--insecure", *at(pair), *options)
    with ours(pair.source, images, "dump", *words) as dump:
        yield images, dump


def at(pair: Pair) -> tuple[object, ...]:
    return "--address", pair.source.address, "--port", PORT


COMMAND = (sys.executable, "-m", "lazyproc.criu.main")
ours = partial(criu, command=COMMAND)
Command = Callable[..., AbstractContextManager[Criu]]


@pytest.mark.parametrize("daemon", [criu, ours])
def test_criu_restores_it(daemon: Command, pair: Pair, program: Program) -> None:
    with (
        dumping(pair, program) as (images, dump),
        restoring(pair, images, daemon) as (pid, lazy),
    ):
        program.watch.wait_beats()
        lazy.finish()
        dump.finish()
        assert program.process.wait(END_S) == -signal.SIGKILL
        ends_well(program, pid)


@pytest.mark.long
def test_over_tls(pair: Pair, program: Program) -> None:
    """A certificate lets CRIU's daemon in, and nobody without one."""
    hosts = str(pair.source.address), str(pair.destination.address)
    here, there = (
        ("--tls", "--tls-cert", keys.cert, "--tls-key", keys.key, "--tls-cacert", keys.ca)
        for keys in make_keys(pair.shared / "keys", hosts, days=9)
    )
    with dumping(pair, program, "--no-insecure", *here) as (images, dump):
        vpid, run = next(lazy_runs(images))
        with client(pair) as stranger:
            stranger.ask(vpid, run.addr, 1)
            assert stranger.hung_up()
        with restoring(pair, images, criu, *there) as (pid, lazy):
            lazy.finish()
            dump.finish()
            ends_well(program, pid)


@pytest.mark.long
@pytest.mark.parametrize("server", [criu, ours])
def test_our_daemon_asks_both_servers(server: Command, pair: Pair, program: Program) -> None:
    """They give images away, in CRIU's protocol."""
    images = pair.shared / "images"
    images.mkdir()
    run_criu(pair.source, images, "dump", "--tree", pair.source.vpid(program.pid), command=COMMAND)
    program.process.wait(END_S)
    with (
        large_pipes(),
        server(pair.source, images, "page-server", "--lazy-pages", *at(pair), *insecure(server)) as serving,
        restoring(pair, images, ours) as (pid, lazy),
    ):
        program.watch.wait_beats()
        lazy.finish()
        serving.finish()
        ends_well(program, pid)


@pytest.mark.long
@pytest.mark.parametrize("daemon", [criu, ours])
def test_a_process_that_ends_there_before_its_last_page(daemon: Command, slow_pair: Pair) -> None:
    """CRIU's client does not say whether that is what has happened; ours may not have wanted any."""
    pair = slow_pair
    with running_there(pair.source, "mixed", MIB, 3, 500, directory=pair.shared) as program:
        program.watch.wait_beats()
        with (
            dumping(pair, program) as (images, dump),
            restoring(pair, images, daemon) as (pid, lazy),
        ):
            if daemon is criu:
                wait_until(lambda: journals(pair.source, SOURCE)[0]["state"] == "parked", "a page is given")
            os.kill(pid, signal.SIGKILL)
            lazy.finish()
            if daemon is ours:
                dump.finish()
                assert program.process.wait(END_S) == -signal.SIGKILL
            else:
                dump.finish(1)
                (session,) = sessions(pair.source)
                assert f"lazyproc abort {session['id']}" in dump.errors()
                run_cli(pair.source, "abort", session["id"])
                assert program.process.wait(END_S) == -signal.SIGKILL


@contextmanager
def restoring(pair: Pair, images: Path, daemon: Command, *options: object) -> Iterator[tuple[int, Criu]]:
    """By CRIU, whose lazy pages the daemon gets from the source."""
    work = pair.shared / "work"
    work.mkdir()
    words = ("--page-server", *at(pair), *insecure(daemon), *options)
    with (
        daemon(pair.destination, images, "lazy-pages", *words, work=work) as lazy,
        restored_by_criu(pair.destination, images, "--lazy-pages", work=work) as pid,
    ):
        yield pid, lazy


def insecure(command: Command) -> tuple[str, ...]:
    """What CRIU is unasked."""
    return ("--insecure",) if command is ours else ()


def ends_well(program: Program, pid: int) -> None:
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
        ends_well(program, pid)


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


@pytest.mark.long
@pytest.mark.parametrize("whom", ["command", "server"])
def test_a_killed_dump_lets_it_run_on(whom: str, pair: Pair, program: Program) -> None:
    with dumping(pair, program) as (images, dump):
        if whom == "command":
            dump.process.kill()
            wait_until(lambda: not journals(pair.source, SOURCE), "who worked for it gives up")
        else:
            os.kill(pair.source.pid(journals(pair.source, SOURCE)[0]["server_pid"]), signal.SIGKILL)
            assert dump.process.wait(END_S) == 1
        assert not Folder(images).images()
    unharmed(pair, program)


@pytest.mark.parametrize("parked", [False, True])
def test_a_process_that_is_killed_is_said_to_be_lost(parked: bool, pair: Pair, program: Program) -> None:
    with dumping(pair, program) as (images, dump):
        vpid, run = next(lazy_runs(images))
        with client(pair) as it:
            if parked:
                it.get(vpid, run.addr, 1)
            program.process.kill()
            wait_until(lambda: gone(program.pid), "it has ended")
            if parked:
                it.ask(vpid, run.addr, 1)
            assert dump.process.wait(END_S) == 1
    assert ("the parked process has ended" if parked else "was killed while it stood still") in dump.errors()
    assert bool(Folder(images).images()) == parked


def unharmed(pair: Pair, program: Program) -> None:
    assert sessions(pair.source) == []
    program.watch.wait_beats()
    program.stop_and_verify()


@pytest.mark.parametrize("end", ["reset", "we are killed"])
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
            else:
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


@pytest.mark.parametrize("server", [criu, ours])
def test_the_pages_of_a_dump_go_to_a_server(server: Command, pair: Pair, program: Program) -> None:
    """Which stores into the folder of the other images."""
    images, work = pair.shared / "images", pair.shared / "work"
    images.mkdir()
    work.mkdir()
    there = ("--address", pair.destination.address, "--port", PORT)
    with server(pair.destination, images, "page-server", *there, *insecure(server)) as receiving:
        words = ("--tree", pair.source.vpid(program.pid), "--page-server", *there, "--insecure")
        run_criu(pair.source, images, "dump", *words, work=work, command=COMMAND)
        receiving.finish()
    assert program.process.wait(END_S) == -signal.SIGKILL
    assert {path.name for path in images.glob("pages-*")} >= {"pages-65537.img"}
    assert not (images / "pages-1.img").exists()
    if server is ours:
        ends_well(program, restore(pair.destination, images).pid)
        return
    with restored_by_criu(pair.destination, images, work=work) as pid:
        ends_well(program, pid)


def test_a_server_that_is_lost_lets_it_run_on(pair: Pair, program: Program) -> None:
    images = pair.shared / "images"
    images.mkdir()
    with network_of(pair.destination), socket.create_server((str(pair.destination.address), PORT)) as door:
        words = ("--page-server", "--address", pair.destination.address, "--port", PORT, "--insecure")
        tree = ("--tree", pair.source.vpid(program.pid))
        command = argv(images, "dump", *tree, *words, command=COMMAND)
        dump = pair.source.popen(command, stdin=subprocess.DEVNULL)
        caller, _ = door.accept()
        with caller:
            caller.recv(100)
            caller.sendall(b"\0")  # it has no parent
            caller.recv(100)
    assert dump.wait(END_S) == 1
    assert f"{pair.destination.address}:{PORT}: the connection broke" in (images / "dump.log").read_text()
    assert not Folder(images).images()
    unharmed(pair, program)


# It writes no file: a process that waits for a disk is not dumped.
ECHO = """
import socket
first = socket.create_server(("", 5000)).accept()[0]
while data := first.recv(100):
    first.sendall(data.upper())
"""


@contextmanager
def echoing(trio: Trio) -> Iterator[tuple[subprocess.Popen[Any], socket.socket]]:
    """A process of the source with a connection to the third host, and its other end."""
    null, found = subprocess.DEVNULL, []
    process = trio.source.popen([sys.executable, "-c", ECHO], stdin=null, stdout=null, stderr=null)

    def answers() -> bool:
        with suppress(ConnectionRefusedError):
            found.append(dialled(trio.client, trio.source.address))
        return bool(found)

    try:
        wait_until(answers, "the process listens")
        with found[0] as sock:
            sock.settimeout(END_S)
            yield process, sock
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
@pytest.mark.parametrize("outcome", ["is killed", "all is given"])
def test_the_peers_of_its_connections_hear_nothing(outcome: str, trio: Trio) -> None:
    """While it is parked, and after its end; what they say meanwhile comes when it runs on here."""
    pair = Pair(trio.source, trio.destination)
    with echoing(trio) as (process, peer):
        with dumping(pair, process, "--tcp-established") as (images, dump):
            runs = list(lazy_runs(images))
            with client(pair) as it:
                for vpid, run in runs if outcome == "all is given" else runs[:1]:
                    assert len(it.get(vpid, run.addr, run.count)) == run.count * PAGE
                (session,) = sessions(pair.source)
                peer.sendall(b"still there\n")
                if outcome == "is killed":
                    kill(pair.source, SOURCE, "keeper", "server")
                else:
                    assert it.close_in_order() == Status(0)
            assert dump.process.wait(END_S) == (outcome != "all is given")
        assert f"lazyproc_dump_{session['id']}_kept" in tables(pair)
        assert not select.select([peer], [], [], 0.1)[0]
        if outcome != "all is given":
            run_cli(pair.source, "resume", session["id"], "--here", "--force")
            assert peer.recv(99) == b"STILL THERE\n"
            assert "lazyproc_" not in tables(pair)
