"""Peers that are not there, are something else, send rubbish or leave: in bounded time, and nobody loses anything."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from lazyproc.errors import ConnectionLost, LazyprocError
from lazyproc.hosts import Pair
from lazyproc.migrate.link import ROLES
from lazyproc.migrate.order import Order
from lazyproc.migrate.prepare import Offer, vdso_build_id
from lazyproc.pages.channel import Channel
from lazyproc.pages.dial import dial
from lazyproc.pages.peer import Trust
from lazyproc.pages.session import Session
from lazyproc.wire.native import (
    Abort,
    Built,
    Committed,
    Event,
    Forecast,
    Images,
    Needs,
    Party,
    Prepare,
    Prepared,
    Role,
)
from tests.faults.helpers import SOURCE, gone, journals, kill
from tests.live.bad_luck import (
    NOBODY,
    PACED,
    ended,
    lazyproc,
    linked,
    listener_on,
    migrated,
    moves,
    says,
    started,
    unchanged,
    unharmed,
)
from tests.live.moving import checkpoint, receiving, restore, run_cli
from tests.live.programs import Program, running, stands_still, wait_until
from tests.live.real import network_of

pytestmark = pytest.mark.long

GARBAGE = bytes(range(256)) * 16


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running(*PACED, directory=pair.shared, host=pair.source) as started:
        yield started


def migrate_to(pair: Pair, program: Program, target: str) -> tuple[object, ...]:
    return ("migrate", pair.source.vpid(program.pid), target, "--insecure", "--retry-for", "0")


# --- nobody, or somebody else -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        ("{there}:1", 1, ("{there}:1: nobody listens there", "start lazyproc receive")),
        ("10.77.0.99:1", 1, ("10.77.0.99:1: cannot be reached", "check the network")),
        ("203.0.113.1:1", 1, ("203.0.113.1:1: cannot be reached (Network is unreachable)",)),
        ("no-such-host.invalid:1", 1, ("no-such-host.invalid:1: the name is not known", "give an address")),
    ],
    ids=["refused", "silent", "no route", "no name"],
)
def test_nobody_there(pair: Pair, program: Program, target: str, code: int, words: tuple[str, ...]) -> None:
    there = pair.destination.address
    with unchanged(pair.source, pair.destination), unharmed(program):
        done = lazyproc(pair.source, *migrate_to(pair, program, target.format(there=there)))
        says(done, code, *(word.format(there=there) for word in words))


@pytest.mark.parametrize("target", ["host", ":1", "host:", "host:70000", "host:-1", ""])
def test_no_address(pair: Pair, target: str) -> None:
    done = lazyproc(pair.source, "migrate", 1, target)
    assert done.returncode == 2
    assert f"argument HOST:PORT: {target!r} is not HOST:PORT" in done.stderr


def test_an_address_of_another_host_to_listen_at(pair: Pair) -> None:
    with unchanged(pair.destination):
        for command in (["receive"], ["serve", "-D", "/tmp"]):
            done = lazyproc(pair.destination, *command, "--listen", f"{pair.source.address}:0", "--insecure")
            says(done, 1, str(pair.source.address) if command == ["receive"] else "inventory.img", "; ")


def http(sock: socket.socket) -> None:
    with sock.accept()[0] as peer:
        peer.recv(4096)
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def closes(sock: socket.socket) -> None:
    sock.accept()[0].close()


def resets(sock: socket.socket) -> None:
    with sock.accept()[0] as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def rubbish(sock: socket.socket) -> None:
    with sock.accept()[0] as peer:
        peer.sendall(GARBAGE)
        peer.recv(4096)


@pytest.mark.parametrize("somebody", [http, closes, resets, rubbish])
def test_somebody_who_is_not_lazyproc(
    pair: Pair, program: Program, somebody: Callable[[socket.socket], None]
) -> None:
    with listener_on(pair.destination, somebody) as target, unchanged(pair.source), unharmed(program):
        says(lazyproc(pair.source, *migrate_to(pair, program, target)), 1, f"{target}: ")


@pytest.mark.slow
def test_somebody_who_says_nothing(pair: Pair, program: Program) -> None:
    with listener_on(pair.destination, lambda sock: None) as target, unharmed(program):
        done = lazyproc(pair.source, *migrate_to(pair, program, target))
        says(done, 1, f"{target}: connected, but there is no answer", "is it lazyproc?")


@pytest.mark.slow
def test_a_firewall_that_drops_everything(pair: Pair, program: Program) -> None:
    wall = "table inet wall { chain inbound { type filter hook input priority 0; tcp dport 7 drop; }; }"
    pair.destination.run(["nft", wall], check=True)
    target = f"{pair.destination.address}:7"
    with unharmed(program):
        done = lazyproc(pair.source, *migrate_to(pair, program, target))
        says(done, 1, f"{target}: cannot be reached (timed out)", "check the network and firewalls")


# --- a destination that fails ------------------------------------------------------------------------------

Last = Callable[[Channel], object]


def hangs_up(control: Channel) -> None:
    control.close()


def talks_rubbish(control: Channel) -> None:
    control.socket.sendall(GARBAGE)
    control.socket.recv(1 << 20)


def says_no(control: Channel) -> None:
    control.send(Abort({"reason": "not today"}))
    control.receive(20)


def destination(answers: tuple[Event, ...], last: Last) -> Callable[[socket.socket], None]:
    """A receiver that gives these answers to PREPARE, IMAGES and COMMIT; `last` is its answer to what comes then."""

    def serve(sock: socket.socket) -> None:
        link = linked(sock, Party.DESTINATION)
        with link.control, link.urgent, link.bulk:
            for answer in answers:
                while isinstance(link.control.receive(20), Needs | Forecast):
                    continue
                link.control.send(answer)
            if Committed() not in answers:  # after that it is its turn to speak
                link.control.receive(20)
            last(link.control)

    return serve


@pytest.mark.parametrize("last", [hangs_up, talks_rubbish, says_no])
@pytest.mark.parametrize("answers", [(), (Prepared(),)], ids=["at PREPARE", "at IMAGES"])
def test_a_destination_that_fails_before_the_commit(
    pair: Pair, program: Program, answers: tuple[Event, ...], last: Last
) -> None:
    with (
        listener_on(pair.destination, destination(answers, last)) as target,
        unchanged(pair.source),
        unharmed(program),
    ):
        done = lazyproc(pair.source, *migrate_to(pair, program, target))
        says(done, 1, target, *(["not today"] if last is says_no else []))
    program.stop_and_verify()


def test_a_destination_that_cannot_commit_after_all(pair: Pair, program: Program) -> None:
    with (
        listener_on(pair.destination, destination((Prepared(), Built()), says_no)) as target,
        unchanged(pair.source),
        unharmed(program),
    ):
        says(lazyproc(pair.source, *migrate_to(pair, program, target)), 1, "10.77.0.2:", "not today")
    program.stop_and_verify()


@pytest.mark.parametrize(
    ("answers", "last", "code", "words"),
    [
        ((Prepared(), Built()), hangs_up, 4, "it is not known whether it runs on the other host"),
        ((Prepared(), Built()), talks_rubbish, 4, "it is not known whether it runs on the other host"),
        ((Prepared(), Built(), Committed()), hangs_up, 4, "cannot be reached after 0 pages"),
        ((Prepared(), Built(), Committed()), talks_rubbish, 4, "cannot be reached after 0 pages"),
        ((Prepared(), Built(), Committed()), says_no, 4, "cannot be reached after 0 pages"),
    ],
    ids=[
        "leaves at COMMIT",
        "rubbish at COMMIT",
        "leaves at COMMITTED",
        "rubbish at COMMITTED",
        "no at COMMITTED",
    ],
)
def test_a_destination_that_fails_at_the_commit(
    pair: Pair,
    program: Program,
    answers: tuple[Event, ...],
    last: Last,
    code: int,
    words: str,
) -> None:
    """It stays parked, whatever signal comes; the sentence says what to do, and that is true."""
    with listener_on(pair.destination, destination(answers, last)) as target:
        done = lazyproc(pair.source, *migrate_to(pair, program, target))
        pid = pair.source.vpid(program.pid)
        (record,) = journals(pair.source, SOURCE)
        says(done, code, f"pid {pid}: ", words, "parked here", f"lazyproc resume {record['id']}")
        os.kill(program.pid, signal.SIGCONT)
        assert stands_still(program)
        if Committed() in answers:  # it may run there: nothing but abort ends it here
            says(done, code, f"end it here with lazyproc abort {record['id']}")
            assert run_cli(pair.source, "resume", record["id"], "--here", "--force", expected=2)
            run_cli(pair.source, "abort", record["id"])
            wait_until(lambda: gone(program.pid), "it is ended")
            return
        assert run_cli(pair.source, "resume", record["id"], "--here", expected=2)
        run_cli(pair.source, "resume", record["id"], "--here", "--force")
    program.stop_and_verify()


def test_a_process_that_is_killed_while_the_other_side_builds(pair: Pair, program: Program) -> None:
    """It is not brought back to life there."""
    heard: list[Event | None] = []

    def built(control: Channel) -> None:
        wait_until(
            lambda: any(each["state"] == "parked" for each in journals(pair.source, SOURCE)), "it is parked"
        )
        program.process.kill()
        wait_until(lambda: gone(program.pid), "it has ended")
        control.send(Built())
        with suppress(ConnectionLost):
            heard.append(control.receive(20))

    with listener_on(pair.destination, destination((Prepared(),), built)) as target:
        done = lazyproc(pair.source, *migrate_to(pair, program, target))
    says(done, 1, f" {pair.source.vpid(program.pid)}: ")
    assert not heard
    assert not journals(pair.source, SOURCE)


@pytest.mark.parametrize("orphaned", [False, True])
def test_abort_of_a_source_in_doubt_ends_it_and_says_so(pair: Pair, program: Program, orphaned: bool) -> None:
    """Whether anybody works on it or not."""
    reached = []

    def waits(control: Channel) -> None:
        reached.append(True)
        control.socket.recv(1)

    with listener_on(pair.destination, destination((Prepared(), Built()), waits)) as target:
        process = started(pair.source, *migrate_to(pair, program, target))
        wait_until(lambda: bool(reached) or process.poll() is not None, "COMMIT has come")
        (record,) = journals(pair.source, SOURCE)
        if orphaned:
            kill(pair.source, SOURCE, "keeper", "server")
        done = run_cli(pair.source, "abort", record["id"], "--json")
        answer = json.loads(done.stdout)
        assert (answer["role"], answer["state"]) == (SOURCE, "orphaned" if orphaned else "parked")
        assert answer["pages_missing"] is None
        assert "not known whether it runs on the other host" in answer["text"]
        wait_until(lambda: gone(program.pid), "it is ended")
        process.communicate()
        assert process.returncode == 4
        assert not journals(pair.source, SOURCE)


def test_a_source_that_is_killed_in_doubt(pair: Pair, program: Program) -> None:
    """Nobody is left who could say so, but it does not run."""
    reached = []

    def waits(control: Channel) -> None:
        reached.append(True)
        control.socket.recv(1)

    with (
        listener_on(pair.destination, destination((Prepared(), Built()), waits)) as target,
        unharmed(program),
    ):
        process = started(pair.source, *migrate_to(pair, program, target))
        wait_until(lambda: bool(reached) or process.poll() is not None, "COMMIT has come")
        (record,) = journals(pair.source, SOURCE)
        kill(pair.source, SOURCE, "keeper", "server")
        process.communicate()
        os.kill(program.pid, signal.SIGCONT)
        assert stands_still(program)
        run_cli(pair.source, "resume", record["id"], "--here", "--force")
    program.stop_and_verify()


def test_a_journal_that_cannot_be_written(pair: Pair, program: Program) -> None:
    """Nothing is decided that is not on disk: the tree runs on here."""
    (pair.destination.outside / "state").write_text("a file, no folder")
    with receiving(pair.destination) as receiver, unchanged(pair.source, pair.destination), unharmed(program):
        done = migrated(pair, receiver, program.pid)
        says(done, 1, receiver.address, "the journal cannot be written", "make room there")


def test_a_lazy_restore_whose_journal_cannot_be_written(pair: Pair, program: Program) -> None:
    """It runs by then: its memory comes all the same."""
    checkpoint(pair.source, program.pid, pair.source.scratch / "images")
    (pair.source.outside / "state").write_text("a file, no folder")
    moved = restore(pair.source, pair.source.scratch / "images", "--lazy")
    assert "the journal cannot be written" in moved.notes
    program.watch.wait_beats()
    moved.end(program.watch)


# --- a source that fails -----------------------------------------------------------------------------------


def prepare() -> Prepare:
    offer = Offer(1, 1, 0, {}, vdso_build_id().hex())
    return Prepare({**offer.fields(), **Order().fields()})


SCRIPTS: tuple[tuple[Event, ...], ...] = (
    (),
    (Prepare({}),),
    (Prepare({"pages": "many", "threads": 1, "cpu": {}, "vdso": ""}),),
    (Prepare({**prepare().fields, "max_rate": "fast", "policy": 7}),),
    (prepare(), Abort({"reason": "x" * 9000})),
    (prepare(), Images(b"")),
    (prepare(), Images(b"lzpk" + GARBAGE)),
    (prepare(), Images(b"lzpk\0\0\0\0")),
)


def test_sources_that_send_rubbish(pair: Pair, program: Program) -> None:
    """Each is noted and forgotten; what comes after them works."""
    with receiving(pair.destination) as receiver:
        with unchanged(pair.destination), network_of(pair.source):
            for script in SCRIPTS:
                session = Session.new()
                control, *pages = (
                    dial(receiver.address, session.hello(role), Party.SOURCE, trust=Trust(insecure=True))
                    for role in ROLES
                )
                with suppress(LazyprocError):
                    for event in script:
                        control.send(event)
                        control.receive(5)
                for channel in (control, *pages):
                    channel.close()
                wait_until(lambda name=session.id: f"session {name}: " in receiver.notes(), "it is noted")  # type: ignore[misc]
        moves(pair, receiver, program)
        assert "Traceback" not in receiver.notes()


# --- strangers ---------------------------------------------------------------------------------------------


def test_strangers_change_nothing(pair: Pair, program: Program) -> None:
    """Garbage, half a HELLO, silence, connections that close at once, a session of somebody else."""
    with receiving(pair.destination) as receiver:
        host, _, port = receiver.address.rpartition(":")
        with unchanged(pair.destination), network_of(pair.source):
            open_ones = [socket.create_connection((host, int(port))) for _ in range(80)]
            for number, sock in enumerate(open_ones):
                with suppress(OSError):
                    sock.sendall((GARBAGE, b"", b"GET / HTTP/1.0\r\n\r\n", b"\0")[number % 4])
                if number % 3 == 0:
                    sock.close()
            session = Session.new()
            control = dial(
                receiver.address, session.hello(Role.CONTROL), Party.SOURCE, trust=Trust(insecure=True)
            )
            thief = Session(session.id, "0" * 32)
            with control, pytest.raises(Exception, match="no such session here"):
                dial(receiver.address, thief.hello(Role.URGENT), Party.SOURCE, trust=Trust(insecure=True))
        moves(pair, receiver, program)
        for sock in open_ones:
            sock.close()
        assert "Traceback" not in receiver.notes()


# Who may open what is mapped, and so could dump a process of his own.
ABLE = (*NOBODY, "--inh-caps=+checkpoint_restore", "--ambient-caps=+checkpoint_restore")


def test_a_user_who_is_not_let_in(pair: Pair) -> None:
    """Loopback is not trust: nobody else gets anything built by root."""
    here, null = pair.destination, subprocess.DEVNULL
    with (
        ended(started(here, "receive", "--listen", "127.0.0.1:0")) as receiver,
        ended(here.popen([*NOBODY, "sleep", "60"], stdin=null, stdout=null, stderr=null)) as theirs,
    ):
        assert receiver.stderr is not None
        target = f"127.0.0.1:{receiver.stderr.readline().split()[-1]}"
        with unchanged(here):
            says(lazyproc(here, "migrate", here.vpid(theirs.pid), target, by=ABLE), 1, target)
        assert theirs.poll() is None
        assert "the peer is uid 65534; --allow-uid 65534 lets that user in" in receiver.stderr.readline()
