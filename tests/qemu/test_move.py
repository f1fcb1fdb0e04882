"""A guest moves by QEMU's monitor: it misses no beat and has no wrong page, and one QEMU has it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lazyproc.facts import replace
from lazyproc.hosts import Pair
from lazyproc.qemu.qmp import Qmp
from lazyproc.wire.frame import Type
from tests.faults.campaign.cases import AtFrame
from tests.faults.campaign.moments import Trap, frame_trap
from tests.faults.helpers import DESTINATION, SOURCE, gone, journal, journals, kill, sessions
from tests.faults.killed_at import killed_at
from tests.faults.test_links_cut import cut
from tests.live.moving import CLI, END_S, Receiver, receiving, run_cli
from tests.live.programs import wait_until
from tests.live.real import Journey, ending, migrating
from tests.live.sshd import serving
from tests.live.test_tls import keys
from tests.qemu.guests import (
    AS_NOBODY,
    SANDBOX,
    Guest,
    Serial,
    Shape,
    beating,
    empty_disk,
    monitor,
    needs_kvm,
)

SLOW = ("--max-rate", "40000000")
SMALL = Shape(memory=96, visited=16)
FIRMWARE = Path("/usr/share/seabios/bios-256k.bin")
MANY_BLOCKS = (
    *("-object", "memory-backend-ram,id=node0,size=96M", "-numa", "node,memdev=node0,cpus=0"),
    *("-object", "memory-backend-ram,id=node1,size=96M,share=on", "-numa", "node,memdev=node1,cpus=1"),
    *("-object", "memory-backend-ram,id=more,size=128M", "-device", "pc-dimm,id=dimm,memdev=more"),
    *("-device", "VGA", "-vnc", "unix:/dev/shm/vnc"),  # each test host has its own
)


@contextmanager
def prepared(
    pair: Pair, shape: Shape = SMALL, *options: str, by: Sequence[str] = ()
) -> Iterator[tuple[Guest, Receiver]]:
    """A guest that beats, and a receiver for it on the other host, run `by` another command."""
    with (
        beating(shape, pair.shared, host=pair.source) as guest,
        waiting(pair, guest, *options, by=by) as receiver,
    ):
        yield guest, receiver


@contextmanager
def waiting(pair: Pair, guest: Guest, *options: str, by: Sequence[str] = ()) -> Iterator[Receiver]:
    command = guest.shape.command(guest.serial.path, pair.destination.scratch / "qmp")
    with receiving(pair.destination, *options, "--", *command, by=by) as receiver:
        yield receiver


@contextmanager
def moving(
    pair: Pair,
    guest: Guest,
    receiver: Receiver,
    *options: str,
    by: str | None = None,
    run_by: Sequence[str] = (),
) -> Iterator[Journey]:
    with migrating(
        pair.source, receiver, guest.pid, *options, by=by, run_by=run_by, monitor=guest.inside
    ) as journey:
        yield journey


def goes_on(serial: Serial) -> None:
    serial.wait(30)
    serial.check()


def arrives(guest: Guest, journey: Journey) -> dict[str, Any]:
    """By itself, and everything is right; QEMU is gone at the source."""
    pid, report = journey.arrive()
    with ending(pid):
        assert guest.process.wait(5) == 0
        goes_on(guest.serial)
    return report


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(Shape(memory=96, visited=16, net=True, options=AS_NOBODY), id="pc, nobody"),
        pytest.param(
            Shape("q35", memory=96, visited=16, cpus=2, shared=True, net=True, options=SANDBOX),
            id="q35, memfd, 2, sandbox",
        ),
        pytest.param(
            Shape(memory=192, visited=16, slots=True, cpus=2, options=MANY_BLOCKS),
            id="NUMA, DIMM, display",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_guest_moves(pair: Pair, shape: Shape) -> None:
    """With a disk on which both QEMUs want a lock."""
    disk = empty_disk(pair.shared)
    disk.chmod(0o666)
    shape = replace(shape, disk=disk)
    with prepared(pair, shape) as (guest, receiver), moving(pair, guest, receiver, *SLOW) as journey:
        journey.wait_running()
        blocks = guest.serial.wait(20).blocks
        assert journey.still_lazy()
        report = arrives(guest, journey)
        assert guest.serial.beats()[-1].blocks > blocks
        assert report["pages_urgent"] > 0
        assert report["fault_us"]["count"] > 0


def test_a_guest_whose_pages_follow_is_not_taken_for_whole(pair: Pair) -> None:
    """What is still missing would be zeros in the images. When all is there it is saved. Nor is the QEMU that has what
    is missing, and would quit, taken for one with a paused guest.
    """
    save = ("checkpoint", "--qemu", pair.destination.scratch / "qmp", "-D", pair.shared / "images")
    with prepared(pair) as (guest, receiver), moving(pair, guest, receiver, *SLOW) as journey:
        journey.wait_running()
        refused = run_cli(pair.destination, *save, expected=3)
        assert "has not got all of its memory yet" in refused.stderr
        refused = run_cli(pair.source, *save[:2], guest.inside, *save[3:], expected=3)
        assert "has moved, or is about to" in refused.stderr
        assert journey.still_lazy()
        pid, _ = journey.arrive()
        with ending(pid):
            goes_on(guest.serial)
            run_cli(pair.destination, *save, expected=0)


@pytest.mark.long
def test_a_guest_moves_with_its_flash(pair: Pair) -> None:
    """QEMU writes the whole of it to its file when the guest goes on (hw/block/pflash_cfi01.c postload_update_cb), out
    of memory that has not come.
    """
    content, file = os.urandom(1 << 16), pair.shared / "flash"
    file.write_bytes(content)
    before = file.stat().st_mtime_ns
    firmware = f"if=pflash,format=raw,readonly=on,file={FIRMWARE}"
    flash = ("-drive", firmware, "-drive", f"if=pflash,format=raw,file={file}")
    with (
        prepared(pair, replace(SMALL, options=flash)) as (guest, receiver),
        moving(pair, guest, receiver, *SLOW) as journey,
    ):
        arrives(guest, journey)
        assert file.read_bytes() == content
        assert file.stat().st_mtime_ns > before


@pytest.mark.long
def test_a_guest_moves_by_tls(pair: Pair) -> None:
    ours, theirs = keys(pair)
    with beating(SMALL, pair.shared, host=pair.source) as guest:
        command = guest.shape.command(guest.serial.path, pair.destination.scratch / "qmp")
        with (
            receiving(pair.destination, "--", *command, trust=theirs, clients=ours) as receiver,
            moving(pair, guest, receiver, *SLOW) as journey,
        ):
            arrives(guest, journey)


@pytest.mark.long
def test_a_guest_moves_by_ssh(pair: Pair) -> None:
    """To a receiver that lets in nobody from elsewhere."""
    with beating(SMALL, pair.shared, host=pair.source) as guest, serving(pair) as sshd:
        command = guest.shape.command(guest.serial.path, pair.destination.scratch / "qmp")
        argv = [*CLI, "receive", "--listen", "127.0.0.1:7070", "--once", "--json", "--", *command]
        receiver = pair.destination.popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert receiver.stderr is not None
            assert "listening" in receiver.stderr.readline()
            target = f"{sshd.target}/7070"
            moved = sshd.popen([*CLI, "migrate", "--qemu", guest.inside, target, "--json", *SLOW])
            out, said = moved.communicate(timeout=END_S)
            assert moved.returncode == 0, said
            assert receiver.wait(END_S) == 0
            with ending(pair.destination.pid(json.loads(out)["root_pid"])):
                assert guest.process.wait(5) == 0
                goes_on(guest.serial)
        finally:
            receiver.kill()
            receiver.wait()


@pytest.mark.long
def test_a_paused_guest_stays_paused(pair: Pair) -> None:
    with prepared(pair) as (guest, receiver):
        with monitor(guest) as qmp:
            qmp.execute("stop")
        with moving(pair, guest, receiver) as journey:
            pid, _ = journey.arrive()
        with ending(pid), Qmp(str(pair.destination.outside / "qmp")) as qmp:
            beats = len(guest.serial.beats())
            assert qmp.execute("query-status")["status"] == "paused"
            assert len(guest.serial.beats()) == beats
            qmp.execute("cont")
            goes_on(guest.serial)


@pytest.mark.long
def test_both_ends_say_that_a_guest_does_not_run_there(pair: Pair) -> None:
    """Since somebody else has a lock on its disk, for one; it is there, and goes on when that is gone."""
    shape = replace(SMALL, disk=empty_disk(pair.shared))
    with prepared(pair, shape) as (guest, receiver):
        with not_to_be_written(pair.shared / "disk"), moving(pair, guest, receiver) as journey:
            pid, _ = journey.arrive()
            assert "the guest is there and does not run" in journey.log()
            assert "the guest is here and does not run" in receiver.notes()
        with ending(pid), Qmp(str(pair.destination.outside / "qmp")) as qmp:
            qmp.execute("cont")
            goes_on(guest.serial)


@contextmanager
def not_to_be_written(image: Path) -> Iterator[None]:
    """As a QEMU says it that shares an image with readers only: a lock on the byte for that (block/file-posix.c
    RAW_LOCK_SHARED_BASE + 1).
    """
    with image.open("rb") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0))
        yield


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(Type.IMAGES, id="while it loads"),
        pytest.param(Type.COMMIT, id="when it has loaded", marks=pytest.mark.long),
    ],
)
def test_the_new_qemu_is_killed_before_the_commit(pair: Pair, kind: Type) -> None:
    """The guest goes on where it was."""
    with prepared(pair) as (guest, receiver):

        def kill_it() -> None:
            record = journal(pair.destination, DESTINATION)
            pid = pair.destination.pid(record["tree"]["root_pid"])
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: gone(pid), "it has ended")

        trap = Trap(kill_it)
        with (
            frame_trap(pair, receiver, AtFrame(kind), trap) as address,
            moving(pair, guest, receiver, by=address) as journey,
        ):
            answer = journey.finish(expected=1)
            assert trap.error is None
            assert "QEMU has ended" in answer["error"]
        goes_on(guest.serial)
        assert not journals(pair.source, SOURCE)


@pytest.mark.long
def test_the_new_qemu_ends_with_its_keeper(pair: Pair) -> None:
    """Before the commit, also one that has dropped its rights. The guest goes on where it was."""
    with prepared(pair, replace(SMALL, options=AS_NOBODY)) as (guest, receiver):

        def kill_it() -> None:
            pid = pair.destination.pid(journal(pair.destination, DESTINATION)["tree"]["root_pid"])
            kill(pair.destination, DESTINATION, "keeper")
            wait_until(lambda: gone(pid), "QEMU has ended")

        trap = Trap(kill_it)
        with (
            frame_trap(pair, receiver, AtFrame(Type.IMAGES), trap) as address,
            moving(pair, guest, receiver, by=address) as journey,
        ):
            journey.finish(expected=1)
            assert trap.error is None
        goes_on(guest.serial)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("pager",), id="pager"),
        pytest.param(("keeper",), id="keeper", marks=pytest.mark.long),
        pytest.param(("keeper", "pager"), id="keeper and pager", marks=pytest.mark.long),
    ],
)
def test_helpers_are_killed_while_the_pages_follow(pair: Pair, names: tuple[str, ...]) -> None:
    with prepared(pair) as (guest, receiver), moving(pair, guest, receiver, *SLOW) as journey:
        journey.wait_running()
        kill(pair.destination, DESTINATION, *names)
        arrives(guest, journey)


@pytest.mark.long
@pytest.mark.parametrize("point", ["committed", "outlived", "COMMITTED said"])
def test_the_keeper_is_killed_around_the_commit(pair: Pair, point: str) -> None:
    """The guest runs: where it was, or here, where somebody else continues it."""
    with prepared(pair, by=killed_at(point)) as (guest, receiver), moving(pair, guest, receiver) as journey:
        if point == "committed":
            journey.finish(expected=1)
            goes_on(guest.serial)
        else:
            arrives(guest, journey)


@pytest.mark.long
@pytest.mark.parametrize(
    ("point", "here"),
    [("IMAGES said", True), ("parked", True), ("COMMIT said", False), ("RUNNING heard", False)],
)
def test_who_moves_it_is_killed_around_the_commit(pair: Pair, point: str, here: bool) -> None:
    with (
        prepared(pair) as (guest, receiver),
        moving(pair, guest, receiver, run_by=killed_at(point)) as journey,
    ):
        if here:
            journey.finish(expected=1)
            goes_on(guest.serial)
            assert not journals(pair.source, SOURCE)
        else:
            arrives(guest, journey)


@pytest.mark.long
def test_all_are_killed_before_the_guest_is_let_run(pair: Pair) -> None:
    """Its memory follows, and who resumes it is told what else is missing."""
    with prepared(pair, by=killed_at("outlived", "all")) as (guest, receiver):
        with moving(pair, guest, receiver) as journey:
            wait_until(lambda: any(it["state"] == "orphaned" for it in sessions(pair.destination)), "all are")
            (left,) = sessions(pair.destination)
            resumed = run_cli(pair.destination, "resume", left["id"])
            assert "see `cont` in its monitor" in resumed.stderr
            journey.finish()
        with ending(pair.destination.pid(left["root_pid"])):
            with Qmp(str(pair.destination.outside / "qmp")) as qmp:
                qmp.execute("cont")
            goes_on(guest.serial)


@pytest.mark.long
def test_the_guest_waits_for_its_helpers(pair: Pair) -> None:
    """All that bring pages are killed together; then who serves them as well."""
    with prepared(pair) as (guest, receiver), moving(pair, guest, receiver, *SLOW) as journey:
        journey.wait_running()
        record = journal(pair.destination, DESTINATION)
        kill(pair.destination, DESTINATION, "keeper", "pager", "guard")
        kill(pair.source, SOURCE, "keeper", "server")
        journey.finish(expected=4)
        with ending(pair.destination.pid(record["tree"]["root_pid"])):
            there = pair.destination.popen([*CLI, "resume", record["id"]], stdin=subprocess.DEVNULL)
            try:
                run_cli(pair.source, "resume", record["id"], expected=0)
                assert there.wait(15) == 0
            finally:
                there.kill()
                there.wait()
            assert guest.process.wait(5) == 0
            goes_on(guest.serial)


@pytest.mark.long
def test_who_is_interrupted_before_the_commit_leaves_it_running(pair: Pair) -> None:
    with prepared(pair) as (guest, receiver):

        def interrupt() -> None:
            journey.process.send_signal(signal.SIGINT)
            wait_until(lambda: not journals(pair.source, SOURCE), "it is called off")

        trap = Trap(interrupt)
        with (
            frame_trap(pair, receiver, AtFrame(Type.IMAGES), trap) as address,
            moving(pair, guest, receiver, by=address) as journey,
        ):
            assert "interrupted" in journey.finish(expected=1)["error"]
            assert trap.error is None
        goes_on(guest.serial)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "words"),
    [(Type.PREPARED, ("stop",)), (Type.BUILT, ("cont",)), (Type.BUILT, ("cont", "stop"))],
)
def test_who_stops_or_continues_it_before_the_commit_has_called_it_off(
    pair: Pair, kind: Type, words: Sequence[str]
) -> None:
    """Somebody else who has a monitor; the guest is left as he wants it, and there is no record of it."""
    second = pair.source.scratch / "second"
    more = ("-qmp", f"unix:{second},server=on,wait=off")
    with (
        beating(SMALL, pair.shared, *more, host=pair.source) as guest,
        waiting(pair, guest) as receiver,
    ):

        def interfere() -> None:
            with Qmp(str(pair.source.outside / "second")) as qmp:
                for word in words:
                    qmp.execute(word)

        trap = Trap(interfere)
        with (
            frame_trap(pair, receiver, AtFrame(kind), trap) as address,
            moving(pair, guest, receiver, by=address) as journey,
        ):
            assert "continued the guest" in journey.finish(expected=1)["error"]
            assert trap.error is None
        assert not journals(pair.source, SOURCE)
        with monitor(guest) as qmp:
            assert qmp.execute("query-status")["running"] is ("cont" in words)
            qmp.execute("cont")
        goes_on(guest.serial)


@pytest.mark.long
def test_wrong_receivers_refuse(pair: Pair) -> None:
    """One for trees, and one whose QEMU is another machine; the guest goes on."""
    with beating(SMALL, pair.shared, host=pair.source) as guest:
        with receiving(pair.destination) as receiver, moving(pair, guest, receiver) as journey:
            assert "receive --listen" in str(journey.finish(expected=3))
        for other, wrong in (
            (Shape(memory=64), "RAM block pc.ram"),
            (replace(SMALL, machine="q35"), "pc-q35"),
            (replace(SMALL, options=("-overcommit", "mem-lock=on")), "has locked its memory"),
        ):
            command = other.command(pair.shared / "nothing", pair.destination.scratch / "qmp")
            with (
                receiving(pair.destination, "--", *command) as receiver,
                moving(pair, guest, receiver) as journey,
            ):
                assert wrong in str(journey.finish(expected=3)["obstacles"])
        goes_on(guest.serial)


@pytest.mark.long
def test_memory_is_not_put_in_another_place(pair: Pair) -> None:
    """Two DIMMs of one size, plugged the other way round: each would have the content of the other."""
    first, second = (
        ("-object", f"memory-backend-ram,id={name},size=128M", "-device", f"pc-dimm,memdev={name}")
        for name in ("first", "second")
    )
    shape = replace(SMALL, memory=128, slots=True, options=(*first, *second))
    other = replace(shape, options=(*second, *first))
    with beating(shape, pair.shared, host=pair.source) as guest:
        command = other.command(guest.serial.path, pair.destination.scratch / "qmp")
        with (
            receiving(pair.destination, "--", *command) as receiver,
            moving(pair, guest, receiver) as journey,
        ):
            obstacles = journey.finish(expected=3)["obstacles"]
            assert [each["where"] for each in obstacles] == [
                "memory /objects/first",
                "memory /objects/second",
            ]
        goes_on(guest.serial)


def test_a_source_hears_why_the_new_qemu_does_not_start(pair: Pair) -> None:
    """Which it does not before the source has asked; the guest goes on."""
    with beating(SMALL, pair.shared, host=pair.source) as guest:
        command = (SMALL.command(pair.shared / "nothing", pair.destination.scratch / "qmp")[0], "-nothing")
        with (
            receiving(pair.destination, "--", *command) as receiver,
            moving(pair, guest, receiver) as journey,
        ):
            assert "does not start" in str(journey.finish(expected=1))
        goes_on(guest.serial)


@pytest.mark.long
def test_the_network_goes_for_ten_seconds(pair: Pair) -> None:
    with prepared(pair) as (guest, receiver), moving(pair, guest, receiver, *SLOW) as journey:
        journey.wait_running()
        with cut(pair.destination):
            time.sleep(10)
        arrives(guest, journey)


@pytest.mark.long
@needs_kvm
def test_a_guest_of_kvm_moves(pair: Pair) -> None:
    """Its faults are the kernel's own."""
    with (
        prepared(pair, Shape(kvm=True, visited=16)) as (guest, receiver),
        moving(pair, guest, receiver, *SLOW) as journey,
    ):
        journey.wait_running()
        arrives(guest, journey)
