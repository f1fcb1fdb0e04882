"""`migrate --release`: the source's memory goes as it is acknowledged, whoever is killed or cut off meanwhile."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from lazyproc.errors import ConnectionLost
from lazyproc.hosts import Pair
from lazyproc.kernel import proc
from lazyproc.migrate.link import Link
from lazyproc.model import PAGE, ObjectKind
from lazyproc.trace import read_trace
from lazyproc.wire.native import (
    Abort,
    Ack,
    Built,
    Commit,
    Committed,
    Event,
    Get,
    Images,
    Map,
    MapEntry,
    Pages,
    Party,
    Ping,
    Pong,
    Prepare,
    Prepared,
    Running,
)
from tests.faults.helpers import DESTINATION, SOURCE, journals, kill, sessions
from tests.faults.test_links_cut import NOTICED_S, cut
from tests.live.bad_luck import COMMAND_S, lazyproc, linked, listener_on, says, unharmed
from tests.live.moving import END_S, receiving, run_cli, tree_of
from tests.live.programs import Program, running, wait_until
from tests.live.real import Journey, ending, migrating, runs
from tests.live.sshd import serving
from tests.live.test_ssh import completes as has_come_by_ssh
from tests.live.test_ssh import start as start_by_ssh
from tests.live.test_tls import secured

pytestmark = pytest.mark.long

E = TypeVar("E", bound=Event)
MIB = 64
SLOW = ("--release", "--max-rate", "20000000")  # 3 seconds for 64 MiB


def held(pid: int) -> int:
    """Bytes of memory that a tree holds: each page once, whoever shares it."""
    rollups = (proc.read(each, "smaps_rollup").decode() for each in tree_of(pid).values())
    lines = (line.split() for rollup in rollups for line in rollup.splitlines())
    return sum(int(words[1]) << 10 for words in lines if words[0] == "Pss:")


def test_both_sides_together_hold_hardly_more_than_one_copy(pair: Pair) -> None:
    """Half of the memory is touched at the destination and nothing else comes: private memory, and memory that two
    processes share."""
    with (
        running("halves", MIB, directory=pair.shared, host=pair.source, exclusive=True) as program,
        receiving(pair.destination) as receiver,
    ):
        program.watch.wait_beats()
        before = held(program.pid)
        assert before > 2 * MIB << 20
        with migrating(pair.source, receiver, program.pid, "--release", "--no-bulk") as journey:
            journey.wait_running()
            program.watch.wait_beats()
            wait_until(lambda: held(program.pid) < 0.6 * before, "the source holds half of it")
            (there,) = journals(pair.destination, DESTINATION)
            root = pair.destination.pid(there["tree"]["root_pid"])
            with ending(root):
                assert held(root) > 0.45 * before
                assert held(root) + held(program.pid) < 1.1 * before
                os.kill(root, signal.SIGUSR1)
                program.watch.wait_beats()
                os.kill(root, signal.SIGTERM)
                program.watch.wait_ended()
            assert journey.finish()["ended"] is True
    assert not runs(program.pid)


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running("memory_random", MIB, "2", directory=pair.shared, host=pair.source, exclusive=True) as it:
        it.watch.wait_beats()
        yield it


def wait_releasing(pair: Pair, journey: Journey, program: Program) -> None:
    """Until part of its memory is gone at the source, and not all of it."""
    before = MIB << 20
    journey.wait_running()
    wait_until(lambda: held(program.pid) < 0.9 * before, "the source frees memory")
    assert journals(pair.source, SOURCE)[0]["state"] == "releasing"
    assert journey.still_lazy()


def completes(pair: Pair, journey: Journey, program: Program) -> dict[str, Any]:
    new, report = journey.arrive()
    verified(program, new)
    wait_until(lambda: not journals(pair.source, SOURCE), "the source's journal is closed")
    wait_until(lambda: not journals(pair.destination, DESTINATION), "the destination's journal is closed")
    return report


def verified(program: Program, new: int) -> None:
    with ending(new):
        program.watch.wait_beats()
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()


@pytest.mark.parametrize("name", ["server", "keeper"])
def test_killed_at_the_source_while_releasing(pair: Pair, program: Program, name: str) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        wait_releasing(pair, journey, program)
        kill(pair.source, SOURCE, name)
        report = completes(pair, journey, program)
        assert report["reconnects"] == (1 if name == "server" else 0)


@pytest.mark.parametrize("names", [("pager",), ("keeper", "pager")])
def test_killed_at_the_destination_while_releasing(
    pair: Pair, program: Program, names: tuple[str, ...]
) -> None:
    """What it has acknowledged its own process has, and is asked for no more."""
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        wait_releasing(pair, journey, program)
        kill(pair.destination, DESTINATION, *names)
        completes(pair, journey, program)


def test_the_link_is_cut_while_releasing(pair: Pair, program: Program) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        wait_releasing(pair, journey, program)
        with cut(pair.destination):
            wait_until(lambda: "reconnecting" in journey.log().splitlines(), "the source notices", NOTICED_S)
            wait_until(lambda: "the source is lost" in receiver.notes(), "so does the destination", NOTICED_S)
        report = completes(pair, journey, program)
        assert report["reconnects"] == 1


def test_with_tls(pair: Pair, program: Program) -> None:
    with secured(pair) as receiver, migrating(pair.source, receiver, program.pid, *SLOW) as journey:
        wait_releasing(pair, journey, program)
        completes(pair, journey, program)


def test_with_a_trace(pair: Pair, program: Program) -> None:
    """Acknowledgements and faults come over the same connection."""
    path = pair.shared / "trace"
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW, "--trace", str(path)) as journey,
    ):
        wait_releasing(pair, journey, program)
        report = completes(pair, journey, program)
    trace = read_trace(path)
    assert trace.lost == 0
    assert 0 < len(trace) == report["fault_us"]["count"]


def test_through_ssh(pair: Pair, program: Program) -> None:
    with serving(pair) as sshd:
        journey = start_by_ssh(sshd, program, *SLOW)
        wait_until(
            lambda: any(each["state"] == "releasing" for each in journals(pair.source, SOURCE)), "it releases"
        )
        wait_until(lambda: held(program.pid) < 0.9 * (MIB << 20), "the source frees memory")
        assert journey.poll() is None
        out, notes = journey.communicate(timeout=END_S)
        assert journey.returncode == 0, notes
        has_come_by_ssh(pair, json.loads(out), program)


def test_once_released_it_can_never_run_here_and_one_resume_completes_it(
    pair: Pair, program: Program
) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        wait_releasing(pair, journey, program)
        kill(pair.source, SOURCE, "keeper", "server")
        assert journey.finish(expected=4)["exit_code"] == 4
        (orphan,) = sessions(pair.source)
        refused = run_cli(pair.source, "resume", orphan["id"], "--here", "--force", expected=2).stderr
        assert "parts of its memory are freed here" in refused
        wait_until(lambda: is_parked(program), "it is parked")
        (orphan,) = sessions(pair.source)
        assert orphan["state"] == "orphaned"
        answer = json.loads(run_cli(pair.source, "resume", orphan["id"], "--json").stdout)
        assert not runs(program.pid)
        verified(program, pair.destination.pid(answer["root_pid"]))


def test_who_asks_again_for_what_it_has_acknowledged_gets_a_sentence_and_no_zeros(
    pair: Pair, program: Program
) -> None:
    """A destination that loses what it said to have, over the next link: nothing can help it."""
    answers: list[str] = []

    def serve(sock: socket.socket) -> None:
        link = linked(sock, Party.DESTINATION)
        begin(link)
        page = a_private_page(next_of(link, Map))
        assert fetched(link, page)
        link.control.send(Ack([page]))
        link.control.send(Ping())
        next_of(link, Pong)  # the source has done it
        link.hang_up()
        link = linked(sock, Party.DESTINATION, link.session)
        link.control.send(Committed())
        link.control.send(Running({"root_pid": 1}))
        next_of(link, Map)
        link.urgent.send(Get(page.object, page.addr, 1, 1))
        answers.append(str(next_of(link, Abort).fields["reason"]))
        with pytest.raises(ConnectionLost):
            link.urgent.receive(COMMAND_S)
        link.hang_up()

    with listener_on(pair.destination, serve) as address:
        done = lazyproc(
            pair.source, "migrate", pair.source.vpid(program.pid), address, "--insecure", "--release"
        )
    says(done, 5, "asks again for the page", "freed here")
    assert "it had acknowledged" in answers[0]
    (orphan,) = sessions(pair.source)
    run_cli(pair.source, "resume", orphan["id"], "--here", "--force", expected=2)
    run_cli(pair.source, "abort", orphan["id"])
    assert not runs(program.pid)


def is_parked(program: Program) -> bool:
    """In pause(2)."""
    return Path(f"/proc/{program.pid}/syscall").read_text().split()[0] == "34"


def begin(link: Link) -> None:
    """As a destination does, up to the hand-over; nothing is built."""
    next_of(link, Prepare)
    link.control.send(Prepared({"release": True}))
    next_of(link, Images)
    link.control.send(Built())
    next_of(link, Commit)
    link.control.send(Committed())
    link.control.send(Running({"root_pid": 1}))


def next_of(link: Link, kind: type[E]) -> E:
    """What comes next of that kind; the rest is passed over."""
    while True:
        event = link.control.receive(COMMAND_S)
        assert event is not None, f"no {kind.__name__}"
        if isinstance(event, kind):
            return event


def a_private_page(known: Map) -> MapEntry:
    task = next(entry for entry in known.entries if entry.object & 0xFF == ObjectKind.TASK)
    return task._replace(pages=1)


def fetched(link: Link, page: MapEntry) -> bytes:
    link.urgent.send(Get(page.object, page.addr, 1, 1))
    part = link.urgent.receive(COMMAND_S)
    assert isinstance(part, Pages)
    assert part.payload == PAGE
    data = bytearray(PAGE)
    link.urgent.receive_pages(memoryview(data), COMMAND_S)
    return bytes(data)


def test_a_receiver_that_acknowledges_nothing_is_found_before_the_freeze(
    pair: Pair, program: Program
) -> None:
    def serve(sock: socket.socket) -> None:
        link = linked(sock, Party.DESTINATION)
        next_of(link, Prepare)
        link.control.send(Prepared())
        link.control.receive(COMMAND_S)

    with listener_on(pair.destination, serve) as address, unharmed(program):
        done = lazyproc(
            pair.source, "migrate", pair.source.vpid(program.pid), address, "--insecure", "--release"
        )
        says(done, 1, "acknowledges no pages", "leave out --release")


def test_nothing_is_released_by_stopcopy(pair: Pair, program: Program) -> None:
    done = lazyproc(
        pair.source, "migrate", pair.source.vpid(program.pid), "10.9.9.9:1", "--release", "--mode", "stopcopy"
    )
    says(done, 2, "nothing is released in mode stopcopy")
