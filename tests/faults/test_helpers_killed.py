"""Whoever of the helpers is killed, at either end: no byte is wrong, one side runs, and it completes by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from lazyproc.hosts import Pair
from lazyproc.wire.frame import Type
from tests.faults.campaign import cases
from tests.faults.campaign.judge import Outcome
from tests.faults.campaign.moments import Trap, frame_trap
from tests.faults.campaign.run import run
from tests.faults.helpers import DESTINATION, SOURCE, helper, journal, journals, kill, sessions
from tests.faults.killed_at import killed_at
from tests.live.moving import CLI, END_S, Receiver, receiving, run_cli
from tests.live.programs import Program, running, wait_until
from tests.live.real import Journey, ending, migrating, processes_of, runs

MIB = "64"
SLOW = ("--max-rate", "20000000")  # 3 seconds for 64 MiB
CRAWLING = ("--max-rate", "3000000")


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running("memory_random", MIB, "2", directory=pair.shared, host=pair.source, exclusive=True) as it:
        it.watch.wait_beats()
        yield it


def completes(pair: Pair, journey: Journey, program: Program) -> dict[str, object]:
    """By itself, and everything is right."""
    new, report = journey.arrive()
    with ending(new):
        program.watch.wait_beats()
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()
    wait_until(lambda: not journals(pair.source, SOURCE), "the source's journal is closed")
    wait_until(lambda: not journals(pair.destination, DESTINATION), "the destination's journal is closed")
    return report


@pytest.mark.parametrize(
    "names",
    [("pager",), ("guard",), ("keeper",), ("pager", "guard"), ("keeper", "pager"), ("keeper", "guard")],
)
def test_killed_at_the_destination(pair: Pair, program: Program, names: tuple[str, ...]) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        journey.wait_running()
        program.watch.wait_beats()
        kill(pair.destination, DESTINATION, *names)
        program.watch.wait_beats()
        completes(pair, journey, program)


@pytest.mark.parametrize("names", [("server",), ("keeper",)])
def test_killed_at_the_source(pair: Pair, program: Program, names: tuple[str, ...]) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        journey.wait_running()
        program.watch.wait_beats()
        kill(pair.source, SOURCE, *names)
        try:
            program.watch.wait_beats()
        except AssertionError:
            print(journey.log(), receiver.notes(), journals(pair.source, SOURCE)[0]["state"])
            os.system("ps -eo pid,ppid,stat,comm,wchan | grep lazyproc")
            raise
        report = completes(pair, journey, program)
        assert report["reconnects"] == (1 if "server" in names else 0)


@pytest.mark.parametrize("point", ["new pager forked", "new pager on record"])
def test_the_keeper_is_killed_while_it_replaces_the_pager(pair: Pair, point: str) -> None:
    """The guard finds descriptors by the numbers in the record, and one pager."""
    with (
        paced(pair, "one") as program,
        receiving(pair.destination, by=killed_at(point)) as receiver,
        migrating(pair.source, receiver, program.pid, *CRAWLING) as journey,
    ):
        journey.wait_running()
        was = journal(pair.destination, DESTINATION)["keeper_pid"]
        kill(pair.destination, DESTINATION, "pager")
        wait_until(
            lambda: journal(pair.destination, DESTINATION)["keeper_pid"] != was, "the guard is the keeper"
        )
        wait_until(lambda: pagers(pair) == 1, "there is one pager")
        completes(pair, journey, program)


def pagers(pair: Pair) -> int:
    return [*processes_of(pair.destination).values()].count("lazyproc-pager")


def test_everything_killed_at_the_destination_is_completed_by_one_resume(
    pair: Pair, program: Program
) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        journey.wait_running()
        program.watch.wait_beats()
        kill(pair.destination, DESTINATION, "keeper", "pager", "guard")
        root = pair.destination.pid(journal(pair.destination, DESTINATION)["tree"]["root_pid"])
        wait_until(lambda: waits_for_a_page(root), "a thread waits for its page")
        assert program.watch.read().errors == 0
        (orphan,) = sessions(pair.destination)
        assert (orphan["state"], orphan["keeper_pid"]) == ("orphaned", None)
        assert orphan["pages_remaining"] > 0
        run_cli(pair.destination, "resume", orphan["id"])
        completes(pair, journey, program)


# It has seen that nobody works on it, and goes on when it is told to.
LATE = """
import sys
from lazyproc.cli.main import main
from lazyproc.migrate import sessions

def late(record):
    demand_orphaned(record)
    print("seen", flush=True)
    sys.stdin.readline()

demand_orphaned, sessions._demand_orphaned = sessions._demand_orphaned, late
sys.exit(main(["resume", sys.argv[1]]))
"""


@pytest.mark.parametrize(
    ("role", "names"), [(DESTINATION, ("keeper", "pager", "guard")), (SOURCE, ("keeper", "server"))]
)
def test_of_two_resumes_at_once_one_changes_nothing(pair: Pair, role: str, names: tuple[str, ...]) -> None:
    host = pair.destination if role == DESTINATION else pair.source
    pipe = subprocess.PIPE
    with (
        paced(pair, "one") as program,
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *CRAWLING) as journey,
    ):
        journey.wait_running()
        kill(host, role, *names)
        session, was = (journal(host, role)[fact] for fact in ("id", f"{names[1]}_pid"))
        argv = [sys.executable, "-c", LATE, session]
        second = host.popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert second.stdout
        assert second.stdout.readline() == "seen\n"
        first = host.popen(
            [*CLI, "resume", session, "--json"], stdin=subprocess.DEVNULL, stdout=pipe, text=True
        )
        wait_until(lambda: journal(host, role)[f"{names[1]}_pid"] != was, "the first one works")
        crew = {name: helper(host, role, name) for name in names}
        _, words = second.communicate(timeout=20)
        assert second.returncode == 2, words
        assert "is being worked on" in words
        assert {name: helper(host, role, name) for name in names} == crew
        kill(host, role, names[1])  # who takes over finds what is right
        out, _ = first.communicate(timeout=30)
        assert first.returncode == 0
        if role == DESTINATION:
            completes(pair, journey, program)
        else:
            with ending(pair.destination.pid(json.loads(out)["root_pid"])):
                program.watch.wait_beats()


def test_who_looks_from_another_network_namespace_sees_that_it_is_worked_on(pair: Pair) -> None:
    """As when receive was started by `ip netns exec`: a second crew would take the tree from the first."""
    with (
        paced(pair, "one") as program,
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *CRAWLING) as journey,
    ):
        journey.wait_running()
        session = journal(pair.destination, DESTINATION)["id"]
        apart = ("unshare", "--net", *CLI)
        listed = pair.destination.run([*apart, "sessions", "--json"], capture_output=True, text=True)
        assert [each["state"] for each in json.loads(listed.stdout)] == ["running"]
        done = pair.destination.run([*apart, "resume", session], capture_output=True, text=True, timeout=20)
        assert done.returncode == 2
        assert "is being worked on" in done.stderr
        completes(pair, journey, program)


def test_a_source_whose_tree_has_ended_with_its_host_is_told_so(pair: Pair) -> None:
    """Its destination was without power, and a receiver is there again."""
    with (
        paced(pair, "one") as program,
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *CRAWLING) as journey,
    ):
        journey.wait_running()
        kill(pair.destination, DESTINATION, "keeper", "pager", "guard")
        record = journal(pair.destination, DESTINATION)
        (path,) = (pair.destination.outside / "state").rglob("*-destination.json")
        path.with_suffix(".new").write_text(json.dumps({**record, "boot_id": "of another time"}))
        path.with_suffix(".new").rename(path)
        assert "it has ended there with its host" in journey.finish(expected=4)["error"]
        run_cli(pair.source, "abort", record["id"])
        os.kill(pair.destination.pid(record["tree"]["root_pid"]), signal.SIGKILL)


def test_of_a_move_within_one_host_each_side_can_be_named(pair: Pair) -> None:
    host = pair.source
    with (
        paced(pair, "one") as program,
        receiving(host) as receiver,
        migrating(host, receiver, program.pid, *CRAWLING) as journey,
    ):
        journey.wait_running()
        kill(host, DESTINATION, "keeper", "pager", "guard")
        session = journal(host, DESTINATION)["id"]
        assert f"{session}-destination" in run_cli(host, "resume", session, expected=2).stderr
        run_cli(host, "resume", f"{session}-destination")
        completes(pair, journey, program)


def test_the_receiver_killed_as_well_the_resumed_keeper_takes_its_place(pair: Pair, program: Program) -> None:
    with (
        receiving(pair.destination, expected=-signal.SIGKILL) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        journey.wait_running()
        receiver.process.kill()
        receiver.process.wait()
        kill(pair.destination, DESTINATION, "keeper", "pager", "guard")
        (orphan,) = sessions(pair.destination)
        run_cli(pair.destination, "resume", orphan["id"])
        completes(pair, journey, program)


def test_a_keeper_that_listens_in_place_of_the_receiver_is_killed_and_the_link_is_lost(pair: Pair) -> None:
    """The door is in the descriptor table that the guard has as well."""
    with listened_for(pair) as (program, _receiver, journey):
        was = journal(pair.destination, DESTINATION)["keeper_pid"]
        kill(pair.destination, DESTINATION, "keeper")
        wait_until(
            lambda: journal(pair.destination, DESTINATION)["keeper_pid"] != was, "the guard is the keeper"
        )
        kill(pair.destination, DESTINATION, "pager")
        completes(pair, journey, program)


def test_trees_that_came_by_one_receiver_find_their_keepers_without_it(pair: Pair) -> None:
    """One of them listens, and hands on who asks for another one."""
    with ExitStack() as stack:
        programs = [stack.enter_context(paced(pair, name)) for name in ("one", "other")]
        receiver = stack.enter_context(receiving(pair.destination, expected=-signal.SIGKILL))
        journeys = []
        for program in programs:
            journeys.append(stack.enter_context(migrating(pair.source, receiver, program.pid, *CRAWLING)))
            journeys[-1].wait_running()
        listened_without(receiver)
        for record in journals(pair.destination, DESTINATION):
            os.kill(pair.destination.pid(record["pager_pid"]), signal.SIGKILL)
        for program, journey in zip(programs, journeys, strict=True):
            assert journey.process.wait(END_S) == 0, journey.log()
            assert not runs(program.pid)
            program.watch.wait_beats()


def test_a_receiver_that_is_started_again_takes_its_place_among_keepers(pair: Pair) -> None:
    """And loses it to them again when it ends, whoever of them is killed."""
    with listened_for(pair) as (program, receiver, journey):
        kill(pair.destination, DESTINATION, "guard")  # the next one is forked when the keeper listens
        again = (*CLI, "receive", "--listen", receiver.address, "--insecure")
        log = pair.destination.outside / "again.log"
        with log.open("w") as file:
            second = pair.destination.popen(again, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        wait_until(lambda: "listening on port" in log.read_text() or second.poll() is not None, "it listens")
        assert second.poll() is None, log.read_text()
        kill(pair.destination, DESTINATION, "pager")
        wait_until(lambda: "reconnecting" in journey.log(), "the link is lost")
        wait_until(
            lambda: journey.log().splitlines()[-1] == "running", "by the second receiver it has another"
        )
        second.kill()
        second.wait()
        was = journal(pair.destination, DESTINATION)["keeper_pid"]
        kill(pair.destination, DESTINATION, "keeper")
        wait_until(
            lambda: journal(pair.destination, DESTINATION)["keeper_pid"] != was, "the guard is the keeper"
        )
        kill(pair.destination, DESTINATION, "pager")
        assert completes(pair, journey, program)["reconnects"] == 2


@contextmanager
def paced(pair: Pair, folder: str) -> Iterator[Program]:
    """A program that is in no hurry to have its pages."""
    (pair.shared / folder).mkdir()
    with running(
        "memory_random", MIB, "2", "2000", directory=pair.shared / folder, host=pair.source
    ) as program:
        program.watch.wait_beats()
        yield program


@contextmanager
def listened_for(pair: Pair) -> Iterator[tuple[Program, Receiver, Journey]]:
    """A tree whose pages follow slowly, by a receiver that was killed."""
    with (
        paced(pair, "one") as program,
        receiving(pair.destination, expected=-signal.SIGKILL) as receiver,
        migrating(pair.source, receiver, program.pid, *CRAWLING) as journey,
    ):
        journey.wait_running()
        listened_without(receiver)
        yield program, receiver, journey


def listened_without(receiver: Receiver) -> None:
    """It is killed, and a keeper listens in its place."""
    receiver.process.kill()
    receiver.process.wait()
    port = int(receiver.address.rpartition(":")[2])
    table = Path(f"/proc/{receiver.host.init_pid}/net/tcp")
    wait_until(lambda: f":{port:04X} 00000000:0000 0A" in table.read_text(), "a keeper listens")


def test_a_pager_alone_that_loses_its_link_leaves_and_one_resume_completes_it() -> None:
    """Nobody can bring it another link, and while it stays nobody may take over."""
    victims = (cases.SERVER, cases.RECEIVER, cases.KEEPER_THERE, cases.GUARD)
    case = cases.Case(0, 0, "memory_random", int(MIB), cases.AtBytes(8 << 20), victims)
    assert run(case) is Outcome.RESUMED


@pytest.mark.parametrize("name", ["guard", "keeper"])
def test_killed_when_all_is_done(pair: Pair, program: Program, name: str) -> None:
    """The record is removed, and the keeper has not been told yet: nobody takes the tree for one that never ran."""

    def kill_one() -> None:
        keeper, guard = (helper(pair.destination, DESTINATION, each) for each in ("keeper", "guard"))
        os.kill(keeper, signal.SIGSTOP)
        for record in (pair.destination.outside / "state").rglob("*-destination.json"):
            record.unlink()
        os.kill(keeper if name == "keeper" else guard, signal.SIGKILL)
        with suppress(ProcessLookupError):  # its parent may have taken it already
            os.kill(keeper, signal.SIGCONT)
        wait_until(lambda: guards(pair) != {guard}, "there is another guard, or none")

    trap = Trap(kill_one)
    with (
        receiving(pair.destination) as receiver,
        frame_trap(pair, receiver, cases.AtFrame(Type.RELEASED), trap) as address,
        migrating(pair.source, receiver, program.pid, by=address) as journey,
    ):
        completes(pair, journey, program)
        assert trap.sprung.wait(20)
        assert trap.error is None


def guards(pair: Pair) -> set[int]:
    return {pid for pid, comm in processes_of(pair.destination).items() if comm == "lazyproc-guard"}


def test_everything_killed_at_the_source_is_completed_by_one_resume(pair: Pair, program: Program) -> None:
    with (
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        journey.wait_running()
        program.watch.wait_beats()
        kill(pair.source, SOURCE, "keeper", "server")
        assert journey.finish(expected=4)["exit_code"] == 4
        (orphan,) = sessions(pair.source)
        assert orphan["state"] == "orphaned"
        assert (
            "second copy"
            in run_cli(pair.source, "resume", orphan["id"], "--here", "--force", expected=2).stderr
        )
        answer = json.loads(run_cli(pair.source, "resume", orphan["id"], "--json").stdout)
        assert answer["reconnects"] == 1
        assert not runs(program.pid)
        new = pair.destination.pid(answer["root_pid"])
        with ending(new):
            program.watch.wait_beats()
            os.kill(new, signal.SIGTERM)
            program.watch.wait_ended()


def waits_for_a_page(root: int) -> bool:
    return any(
        Path(f"/proc/{root}/task/{tid}/wchan").read_text() == "handle_userfault"
        for tid in os.listdir(f"/proc/{root}/task")
    )


def test_receive_once_ends_with_those_who_worked_on_its_tree(pair: Pair, program: Program) -> None:
    with (
        receiving(pair.destination, "--once", expected=4) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        journey.wait_running()
        kill(pair.destination, DESTINATION, "keeper", "pager", "guard")
        assert receiver.process.wait(END_S) == 4
        assert "nobody works on it any more" in receiver.notes()
        (orphan,) = sessions(pair.destination)
        run_cli(pair.destination, "resume", orphan["id"])
        completes(pair, journey, program)
