"""What CRIU 4.2 loses or corrupts when something fails in the middle of a lazy migration, row by row; here it must not.

| what happens | test |
|---|---|
| the page server ends (SIGTERM) | `test_page_server_ends` |
| the page server is killed | `test_helpers_killed.py::test_killed_at_the_source` |
| the lazy-pages daemon is killed | `test_helpers_killed.py::test_killed_at_the_destination` |
| the network is cut | `test_links_cut.py::test_the_network_goes_and_comes_back` |
| the restore fails early: the pid is taken | `test_needs.py::test_a_number_that_is_taken_matters_in_...` |
| the restore fails late | `test_restore_fails_late` |
| the target is killed in the middle | `test_target_killed` |
| the dump is killed before any client | `test_dump_killed_before_any_client` |
| left running, and restored lazily | `test_left_running_and_lazy` |
| somebody connects to the page port and closes | `test_connect_and_close` |
| a page is asked for that is not there | `test_server.py::test_what_no_segment_has_is_absent` |
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from lazyproc.hosts import Pair
from lazyproc.wire.frame import Type
from tests.faults.campaign.cases import AtFrame
from tests.faults.campaign.moments import Trap, frame_trap
from tests.faults.helpers import DESTINATION, SOURCE, gone, helper, journal, journals
from tests.faults.hostile import listening
from tests.live.bad_luck import PACED, lazyproc, unharmed
from tests.live.moving import checkpoint, receiving, run_cli
from tests.live.programs import Program, running, wait_until
from tests.live.real import ending, migrating, network_of, processes_of, runs

SLOW = ("--max-rate", "4000000")  # 2 seconds for 8 MiB


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running(*PACED, directory=pair.shared, host=pair.source, exclusive=True) as it:
        yield it


def test_page_server_ends(pair: Pair, program: Program) -> None:
    """No page reads as zeros, and the source does not run on beside its copy."""
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        journey.wait_running()
        os.kill(helper(pair.source, SOURCE, "server"), signal.SIGTERM)
        ends_there(program, journey.arrive()[0])


def test_restore_fails_late(pair: Pair, program: Program) -> None:
    """At the last step, when the tree stands there complete: the commit cannot be written down."""

    def spoil() -> None:
        sessions = pair.destination.outside / "state/lazyproc/sessions"
        record = sessions / f"{journal(pair.source, SOURCE)['id']}-destination.json"
        record.unlink()
        record.mkdir()

    trap = Trap(spoil)
    with receiving(pair.destination) as receiver, unharmed(program):
        with (
            frame_trap(pair, receiver, AtFrame(Type.COMMIT), trap) as address,
            migrating(pair.source, receiver, program.pid, by=address) as journey,
        ):
            assert journey.finish(expected=1)["exit_code"] == 1
        assert trap.error is None
        assert trap.sprung.is_set()
        assert "the journal cannot be written" in journey.log()
        wait_until(
            lambda: "memory_random" not in processes_of(pair.destination).values(), "it is ended there"
        )
    assert not journals(pair.source, SOURCE)


def test_target_killed(pair: Pair, program: Program) -> None:
    """It has run there and was ended there: that is its end, and is said."""
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        journey.wait_running()
        (root,) = (pid for pid, comm in processes_of(pair.destination).items() if comm == "memory_random")
        os.kill(root, signal.SIGKILL)
        report = journey.finish()
        assert report["ended"] is True
        assert not runs(program.pid)
    assert program.watch.read().errors == 0
    assert not journals(pair.source, SOURCE)
    assert not journals(pair.destination, DESTINATION)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_dump_killed_before_any_client(pair: Pair, program: Program, number: signal.Signals) -> None:
    with unharmed(program), listening(pair.source, "serve", pair.source.vpid(program.pid)) as it:
        it.process.send_signal(number)
        it.process.wait()
    program.stop_and_verify()


def test_left_running_and_lazy(pair: Pair) -> None:
    """The source runs on at once, not only when the copy's memory has come. `migrate` never leaves two."""
    images = pair.shared / "images"
    with running(*PACED, directory=pair.shared, host=pair.source) as program:
        with unharmed(program):
            checkpoint(pair.source, program.pid, images, "--leave-running")
        words = ("migrate", pair.source.vpid(program.pid), "10.77.0.2:1", "--leave-running")
        assert lazyproc(pair.source, *words).returncode == 2
        program.stop_and_verify()
    restored = run_cli(pair.destination, "restore", "-D", images, "--lazy", "--detach", "--json")
    new = pair.destination.pid(json.loads(restored.stdout)["root_pid"])
    with ending(new):
        os.kill(new, signal.SIGTERM)
        wait_until(lambda: gone(new), "it has done its last check")
    assert program.watch.read().errors == 0


def test_connect_and_close(pair: Pair, program: Program) -> None:
    """A port scan is no transfer: the tree is not even frozen."""
    with (
        unharmed(program),
        listening(pair.source, "serve", pair.source.vpid(program.pid), "--insecure") as it,
    ):
        host, _, port = it.address.rpartition(":")
        with network_of(pair.destination):
            for _ in range(20):
                socket.create_connection((host, int(port))).close()
        program.watch.wait_beats()
        assert it.process.poll() is None
        assert "frozen" not in it.notes()
    program.stop_and_verify()


def ends_there(program: Program, new: int) -> None:
    with ending(new):
        program.watch.wait_beats()
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()
