"""The trace of real faults: from the pager, from `restore --trace` and from `migrate --trace`."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy

import lazyproc
from lazyproc.hosts import Pair
from lazyproc.migrate.link import Gathering
from lazyproc.migrate.talk import expect
from lazyproc.model import PAGE
from lazyproc.pages.door import listen
from lazyproc.pages.peer import Trust
from lazyproc.runs import Segment
from lazyproc.trace import FIELDS, HEADER_BYTES, Fault, Trace, decode
from lazyproc.uffd.recorder import Recorder
from lazyproc.wire.native import Forecast, Needs, Party, Prepare, Prepared
from tests.live.lazy_rig import DEADLINE, TASK, Rig, child, content, digest, faults, pager, rig, server
from tests.live.moving import CLI, Moved, migrate, receiving, run_cli, tree_of
from tests.live.programs import running, wait_until

RING = 1 << 16  # LEDGER_TRACE of _ledger.h
PACED = ("8", "2", "1000")
WATCHED = ("64", "4", "200")  # enough faults for percentiles


def traced_rig(pages: int = 8) -> Any:
    return rig(pages, trace=True)


def touch(r: Rig, page: int) -> None:
    assert r.child.call("digest", addr=r.at(page), length=PAGE) == r.expect(page, 1)


# --- records ----------------------------------------------------------------------------------------------


def test_one_record_a_fault() -> None:
    with traced_rig() as r:
        r.start()
        for page in (5, 1, 7):
            touch(r, page)
        seen = faults(r.pager)
        assert [fault.addr for fault in seen] == [r.at(5), r.at(1), r.at(7)]
        assert all(fault.time_ns <= fault.queued_ns <= fault.sent_ns <= fault.installed_ns for fault in seen)
        assert all(fault.queued_ns > 0 for fault in seen)
        assert {(fault.object, fault.source, fault.outcome) for fault in seen} == {
            (TASK.key, "urgent", "installed")
        }
        assert faults(r.pager) == []


def test_who_waits_for_a_page_that_is_asked_for_already_asks_for_nothing() -> None:
    with traced_rig() as r:
        held = r.server.hold("urgent", r.at(3))
        r.start()
        first = r.child.begin("digest", addr=r.at(3), length=PAGE)
        r.server.wait_for("urgent", r.at(3))
        second = r.child.begin("digest", addr=r.at(3) + 8, length=8)
        wait_until(lambda: _waiting(r.child.process.pid) == 2, "both wait")
        third = r.child.begin("digest", addr=r.at(5), length=PAGE)  # whose request leaves while they wait
        wait_until(lambda: _waiting(r.child.process.pid) == 3, "the third waits")
        r.pager.counters()  # its request has left before the lock is free
        held.set()
        assert first.result(DEADLINE) == r.expect(3, 1)
        assert third.result(DEADLINE) == r.expect(5, 1)
        second.result(DEADLINE)
        of_page = [fault for fault in faults(r.pager) if fault.addr == r.at(3)]
        seen = sorted((fault.queued_ns > 0, fault.sent_ns > 0) for fault in of_page)
        assert seen == [(False, False), (True, True)]


def _waiting(pid: int) -> int:
    """Threads that wait for a page."""
    found = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += (task / "wchan").read_text() == "handle_userfault"
    return found


def test_pages_at_hand_are_neither_asked_for_nor_sent() -> None:
    with child() as process, pager(trace=True) as made:
        data = content(4)
        addr = process.call("mmap", length=4 * PAGE)
        image = os.memfd_create("pages-1.img")
        os.write(image, data)
        made.add_region(made.add_space(process.register((addr, 4 * PAGE)), 77), addr, 4 * PAGE, TASK, addr)
        made.serve_segments([Segment(TASK.key, addr, addr + 4 * PAGE, image, 0)])
        os.close(image)
        made.start(bulk=False)
        assert process.call("digest", addr=addr, length=PAGE) == digest(data[:PAGE])
        (fault,) = faults(made)
        assert (fault.queued_ns, fault.sent_ns, fault.vpid, fault.object_addr) == (0, 0, 77, addr)
        assert fault.tid != 77


def test_a_forked_child_is_known_by_its_own_number() -> None:
    with traced_rig() as r:
        r.start()
        touch(r, 0)
        assert r.child.call("fork_digest", addr=r.at(1), length=2 * PAGE) == r.expect(1, 2)
        mine, *others = faults(r.pager)
        assert len(others) == 2
        assert {fault.vpid for fault in others} == {fault.tid for fault in others} != {mine.vpid}
        assert len({fault.vpid for fault in others}) == 1


# --- more than the ring holds -----------------------------------------------------------------------------


@contextmanager
def holes(pages: int) -> Iterator[tuple[Callable[[int, int], object], Any]]:
    """A function that touches pages without content, (first, count), and their pager."""
    with child() as process, pager(trace=True) as made, server({}) as source:
        addr = process.call("mmap", length=pages * PAGE)
        made.add_region(
            made.add_space(process.register((addr, pages * PAGE))), addr, pages * PAGE, TASK, addr
        )
        made.serve_remote(*source.connect())
        made.apply_map({TASK: []})
        made.start(bulk=False)

        def touched(first: int, count: int) -> object:
            return process.call("digest", addr=addr + first * PAGE, length=count * PAGE)

        yield touched, made


def test_the_oldest_are_lost_when_nobody_drains_and_it_is_said() -> None:
    more = 2000
    with holes(RING + more) as (touched, made):
        for first in range(0, RING + more, 1000):
            touched(first, min(1000, RING + more - first))
        assert made.counters().fault_us.count == RING + more
        pieces = list(made.trace())
        seen = [fault for records, _ in pieces for fault in decode(records)]
        assert pieces[-1][1] == more + 1  # the slot of the oldest may be in the making
        assert len(seen) == RING - 1
        assert len({fault.addr for fault in seen}) == RING - 1
        ends = [fault.installed_ns for fault in seen]
        assert ends == sorted(ends)
        assert list(made.trace()) == []


def test_nothing_is_lost_when_it_is_drained_meanwhile() -> None:
    pages = RING // 2
    kept: list[Fault] = []
    losses: list[int] = []

    def sink(records: bytes, lost: int) -> None:
        kept.extend(decode(records))
        losses.append(lost)

    with holes(pages) as (touched, made):
        recorder = Recorder(made, sink)
        for first in range(0, pages, 512):
            touched(first, 512)
        assert made.counters().fault_us.count == pages
        assert len(losses) > 1, "it drains while faults come"
        recorder.close()
        assert set(losses) == {0}
        assert len({fault.addr for fault in kept}) == len(kept) == pages


def test_readers_and_the_writer_at_once() -> None:
    """Each record comes once and whole, however hard the ring is read."""
    pages = 8192
    kept: list[Fault] = []
    stopping = threading.Event()
    with holes(pages) as (touched, made):

        def read() -> None:
            while not stopping.is_set():
                kept.extend(faults(made))

        reader = threading.Thread(target=read)
        reader.start()
        touched(0, pages)
        stopping.set()
        reader.join()
        kept += faults(made)
        assert len({fault.addr for fault in kept}) == len(kept) == pages
        assert all(0 < fault.time_ns <= fault.installed_ns for fault in kept)


def test_it_ends_where_the_report_ends() -> None:
    with holes(64) as (touched, made):
        touched(0, 40)
        assert made.counters().fault_us.count == 40
        first = [fault for records, _ in made.trace(25) for fault in decode(records)]
        assert len(first) == 25
        assert list(made.trace(25)) == []
        assert len(faults(made)) == 15


# --- restore ----------------------------------------------------------------------------------------------


def agrees(trace: Trace, fault_us: dict[str, float]) -> None:
    """The percentiles of the trace are those of the report, whose buckets are a sixteenth of an octave wide."""
    waits = sorted(fault.waited_ns / 1000 for fault in trace)
    assert len(waits) + trace.lost == fault_us["count"]
    assert waits[-1] == fault_us["max"]
    for name, fraction in (("p50", 0.50), ("p90", 0.90), ("p99", 0.99)):
        exact = waits[math.ceil(fraction * len(waits)) - 1]
        assert abs(exact - fault_us[name]) <= exact / 16, (name, exact, fault_us)


def well_formed(path: Path, trace: Trace, vpids: set[int], began: float) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert trace.lost == 0
    ends = [fault.installed_ns for fault in trace]
    assert ends == sorted(ends)
    assert {fault.vpid for fault in trace} <= vpids
    assert all(fault.addr % PAGE == 0 and fault.time_ns <= fault.installed_ns for fault in trace)
    first = trace.clock.realtime_ns + next(iter(trace)).time_ns - trace.clock.monotonic_ns
    assert began < first / 1e9 < time.time()
    table = numpy.fromfile(path, list(FIELDS), offset=HEADER_BYTES)
    assert (table["installed"] - table["time"]).tolist() == [fault.waited_ns for fault in trace]


def restored(
    tmp_path: Path, *words: object, expected: int = 0
) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.time()
    done = subprocess.run([*CLI, "restore", *map(str, words)], capture_output=True, text=True, timeout=60)
    assert done.returncode == expected, done.stderr
    return done, began


def test_a_lazy_restore(tmp_path: Path) -> None:
    with running("memory_random", *WATCHED, directory=tmp_path) as program:
        subprocess.run([*CLI, "checkpoint", str(program.pid), "-D", str(tmp_path / "images")], check=True)
        program.process.wait()
    path = tmp_path / "trace"
    done, began = restored(
        tmp_path, "-D", tmp_path / "images", "--lazy", "--detach", "--json", "--trace", path
    )
    report = json.loads(done.stdout)
    try:
        trace = lazyproc.read_trace(path)
        assert trace.session == ""
        assert len(trace) > 0
        well_formed(path, trace, {report["root_vpid"]}, began)
        agrees(trace, report["fault_us"])
        assert {fault.sent_ns for fault in trace} == {0}
    finally:
        os.kill(report["root_pid"], signal.SIGKILL)


def test_only_a_lazy_restore_has_faults(tmp_path: Path) -> None:
    done, _ = restored(tmp_path, "-D", tmp_path, "--trace", tmp_path / "trace", expected=2)
    assert "only a lazy restore has faults" in done.stderr
    assert not (tmp_path / "trace").exists()


def test_a_fetched_tree(pair: Pair) -> None:
    path = pair.shared / "trace"
    address = f"{pair.source.address}:7800"
    with running("memory_random", *WATCHED, directory=pair.shared, host=pair.source) as program:
        vpid = pair.source.vpid(program.pid)
        command = [*CLI, "serve", str(vpid), "--listen", address, "--insecure"]
        serving = pair.source.popen(command, stderr=subprocess.PIPE, text=True)
        assert serving.stderr is not None
        assert any("listening" in line for line in serving.stderr)
        began = time.time()
        done = run_cli(
            pair.destination,
            "restore",
            "--from",
            address,
            "--insecure",
            "--detach",
            "--json",
            "--trace",
            path,
        )
        report = json.loads(done.stdout)
        moved = Moved(pair.destination.pid(report["root_pid"]), report, "")
        assert serving.wait(DEADLINE) == 0
        trace = lazyproc.read_trace(path)
        assert len(trace.session) == 16
        well_formed(path, trace, {vpid}, began)
        agrees(trace, report["fault_us"])
        moved.end(program.watch)


# --- migrate ----------------------------------------------------------------------------------------------


def test_the_faults_of_a_migration_are_written_where_it_was_ordered(pair: Pair) -> None:
    path = pair.shared / "trace"
    with (
        receiving(pair.destination) as receiver,
        running("memory_random", *WATCHED, directory=pair.shared, host=pair.source) as program,
    ):
        vpid, began = pair.source.vpid(program.pid), time.time()
        report = json.loads(migrate(pair.source, receiver, program.pid, "--trace", str(path)).stdout)
        moved = Moved(pair.destination.pid(report["root_pid"]), report, "")
        trace = lazyproc.read_trace(path)
        assert trace.session == report["session"]
        well_formed(path, trace, {vpid}, began)
        agrees(trace, report["fault_us"])
        urgent = [fault for fault in trace if fault.queued_ns]
        assert all(
            f.time_ns <= f.queued_ns <= f.sent_ns <= f.installed_ns for f in urgent if f.source == "urgent"
        )
        assert len({fault.tid for fault in trace}) > 1
        moved.end(program.watch)


def test_children_forked_while_pages_were_missing(pair: Pair) -> None:
    path = pair.shared / "trace"
    with (
        receiving(pair.destination) as receiver,
        running("fork_lazy", "8", directory=pair.shared, host=pair.source) as program,
    ):
        program.watch.wait_beats()
        before = set(tree_of(program.pid))
        report = json.loads(migrate(pair.source, receiver, program.pid, "--trace", str(path)).stdout)
        moved = Moved(pair.destination.pid(report["root_pid"]), report, "")
        trace = lazyproc.read_trace(path)
        agrees(trace, report["fault_us"])
        new = [fault for fault in trace if fault.vpid not in before]
        assert all(fault.vpid == fault.tid for fault in new)
        assert 0 not in {fault.vpid for fault in trace}
        moved.end(program.watch)


def test_without_faults_the_trace_is_empty(pair: Pair) -> None:
    path = pair.shared / "trace"
    with (
        receiving(pair.destination) as receiver,
        running("memory_random", *PACED, directory=pair.shared, host=pair.source) as program,
    ):
        options = ("--mode", "stopcopy", "--trace", str(path))
        report = json.loads(migrate(pair.source, receiver, program.pid, *options).stdout)
        assert (len(lazyproc.read_trace(path)), report["fault_us"]["count"]) == (0, 0)
        Moved(pair.destination.pid(report["root_pid"]), report, "").end(program.watch)


def test_a_trace_that_cannot_be_written_is_found_before_anything_happens(pair: Pair) -> None:
    with (
        receiving(pair.destination) as receiver,
        running("memory_random", *PACED, directory=pair.shared, host=pair.source) as program,
    ):
        done = migrate(pair.source, receiver, program.pid, "--trace", "/no/such/trace", expected=1)
        assert "/no/such/trace: the trace cannot be written: No such file or directory" in done.stderr
        assert "session" not in receiver.notes()
        program.watch.wait_beats()
        program.stop_and_verify()


def test_a_receiver_that_knows_no_trace(tmp_path: Path) -> None:
    """It takes the order, of which it ignores what it does not know."""
    orders: list[Prepare] = []
    with (
        running("memory_random", *PACED, directory=tmp_path) as program,
        listen("127.0.0.1:0", Party.DESTINATION, trust=Trust()) as door,
        closing(Gathering()) as gathering,
    ):

        def answer() -> None:
            link = gathering.next(door, DEADLINE)
            assert link is not None
            expect(link.control, Needs, DEADLINE)
            expect(link.control, Forecast, DEADLINE)
            orders.append(expect(link.control, Prepare, DEADLINE))
            link.control.send(Prepared())

        thread = threading.Thread(target=answer)
        thread.start()
        command = [
            *CLI,
            "migrate",
            str(program.pid),
            f"127.0.0.1:{door.port}",
            "--trace",
            str(tmp_path / "trace"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        thread.join()
        assert done.returncode == 1, done.stderr
        assert "the receiver sends no trace; update it, or leave out --trace" in done.stderr
        assert orders[0].fields["trace"] is True
        program.stop_and_verify()
