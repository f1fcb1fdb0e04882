"""What a receiver owes to trees that came before counts before the next one is frozen."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lazyproc.hosts import Pair
from lazyproc.kernel.cgroup import Hierarchy
from lazyproc.migrate.link import dialled
from lazyproc.migrate.order import Order
from lazyproc.migrate.prepare import Offer, objections, vdso_build_id
from lazyproc.migrate.promises import Promise
from lazyproc.migrate.room import Room, rooms
from lazyproc.migrate.talk import expect
from lazyproc.model import PAGE
from lazyproc.pages.peer import Trust
from lazyproc.wire.native import Party, Prepare, Prepared
from tests.faults.helpers import DESTINATION, SOURCE, journal, journals, sessions
from tests.live.bad_luck import migrated, says, unharmed
from tests.live.moving import Receiver, receiving, run_cli
from tests.live.programs import Program, running, wait_until
from tests.live.real import ending, migrating, network_of
from tests.live.test_bad_luck_hosts import in_a_place_where, memory_limited
from tests.live.tracees import state_of

MIB = 1 << 20
EACH, FREE = 48, 64  # MiB: of a program, and what is to stay free
ONE_AND_A_HALF = FREE + 24 + EACH * 3 // 2  # 24: `receive` itself, and its keepers


@contextmanager
def two_programs(pair: Pair) -> Iterator[tuple[Program, Program]]:
    with ExitStack() as stack:
        programs = []
        for name in ("first", "second"):
            (pair.shared / name).mkdir()
            arguments = ("memory_random", EACH, 1, 1000)
            programs.append(
                stack.enter_context(running(*arguments, directory=pair.shared / name, host=pair.source))
            )
        yield programs[0], programs[1]


@contextmanager
def stopped(program: Program) -> Iterator[None]:
    """It touches nothing where it arrives."""
    os.kill(program.pid, signal.SIGSTOP)
    wait_until(lambda: state_of(program.pid) == "T", "it stands still")
    yield


@contextmanager
def narrow(pair: Pair, *options: str) -> Iterator[Receiver]:
    """A receiver in a memory cgroup that has room for one of the programs and a half."""
    with memory_limited(os.getpid(), ONE_AND_A_HALF * MIB) as group:
        by = in_a_place_where(f"echo $$ > {group}/cgroup.procs")
        with receiving(pair.destination, *options, by=by) as receiver:
            yield receiver


@pytest.mark.parametrize("overcommit", [False, True])
def test_pages_that_a_tree_still_misses_are_not_free(pair: Pair, overcommit: bool) -> None:
    with (
        two_programs(pair) as (first, second),
        stopped(first),
        narrow(pair, *(["--overcommit"] if overcommit else [])) as receiver,
        migrating(pair.source, receiver, first.pid, "--no-bulk") as journey,
    ):
        journey.wait_running()
        (info,) = sessions(pair.destination)
        assert info["pages_remaining"] * PAGE > EACH * 3 // 4 * MIB, "it has got next to nothing"
        with ending(pair.destination.pid(info["root_pid"])):
            if overcommit:
                with migrating(pair.source, receiver, second.pid, "--no-bulk") as other:
                    other.wait_running()
                    for each in journals(pair.destination, DESTINATION):
                        run_cli(pair.destination, "abort", each["id"], expected=5)
            else:
                with unharmed(second):
                    done = migrated(pair, receiver, second.pid)
                    says(
                        done, 3, "the tree has ", "MiB available (", "MiB more belong to trees that are still getting",
                        "use receive --overcommit",
                    )  # fmt: skip
                run_cli(pair.destination, "abort", info["id"], expected=5)
        for each in journals(pair.source, SOURCE):
            run_cli(pair.source, "abort", each["id"])


def test_a_tree_on_its_way_in_has_its_place_until_it_gives_up(pair: Pair) -> None:
    """Also before it is there: whoever asks next is told."""
    offer = Offer(EACH * MIB // PAGE, 1, 0, {}, vdso_build_id().hex())
    with two_programs(pair) as (first, _), narrow(pair) as receiver:
        with network_of(pair.source), dialled(receiver.address, Party.SOURCE, Trust(insecure=True)) as link:
            link.control.send(Prepare({**offer.fields(), **Order().fields()}))
            expect(link.control, Prepared, 20)
            assert journal(pair.destination, DESTINATION)["state"] == "arriving"
            with unharmed(first):
                says(migrated(pair, receiver, first.pid), 3, f"{EACH} MiB more belong to trees")
        wait_until(lambda: not journals(pair.destination, DESTINATION), "it has given up")
        with migrating(pair.source, receiver, first.pid) as journey:
            new, _report = journey.arrive()
            with ending(new):
                first.watch.wait_beats()


def test_promises_count_in_their_groups_and_those_above(tmp_path: Path) -> None:
    for name in ("a", "a/b", "a/bc"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "memory.max").write_text("1000")
        (folder / "memory.current").write_text("100")
        (folder / "memory.stat").write_text("inactive_file 0")
    hierarchy = Hierarchy("", str(tmp_path), "/", "/")
    promised = [
        Promise(10, {"": "/a/b"}),
        Promise(20, {"": "/a/bc"}),
        Promise(40, {"": "/a"}),
        Promise(80, {}),
    ]
    assert [(room.whose, room.promised, room.bytes) for room in rooms(hierarchy, "/a/b", promised)] == [
        ("cgroup /a/b", 10, 890),
        ("cgroup /a", 70, 830),
    ]


def test_an_objection_names_what_is_owed_and_no_negative_figures() -> None:
    offer = Offer(MIB // PAGE, 1, 0, {}, vdso_build_id().hex())
    (obstacle,) = objections(offer, Room(-5 * MIB, promised=7 * MIB))
    assert "1 MiB and this host 0 MiB available (7 MiB more belong to trees" in obstacle.why
