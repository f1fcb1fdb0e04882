"""What a process changes between the look at it and the freeze is in the dump, although the look is kept.

Each change comes at the one moment that counts: the look is over, the freeze has not begun. The dump that takes over
what was seen must then be the dump that asks for everything anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazyproc.dump.freeze import frozen_tree
from lazyproc.dump.gather import dumped
from lazyproc.dump.source import dump_pages
from lazyproc.dump.space import NOTHING, Seen
from lazyproc.errors import CannotBeDone
from lazyproc.events import Event, Note, ignore
from lazyproc.facts import replace
from lazyproc.images.convert import from_images, to_images
from lazyproc.images.forecast import forecast_images, read_forecast
from lazyproc.images.memory import access_modes
from lazyproc.kernel import proc
from lazyproc.migrate.source import look
from lazyproc.model import Checkpoint, Clocks, RegularFile, Vma
from lazyproc.restore.groundwork import laid
from lazyproc.restore.tree import built_tree, expecting
from tests.live import moving
from tests.live.held_up import held_up
from tests.live.test_cli import killed_at_the_end, listening
from tests.live.tracees import Running, tracee
from tests.needs import require_root

PROGRAM = Path(__file__).with_name("changing.c").read_text()
CHANGES = re.findall(r"CHANGE\((\w+)\)", PROGRAM.partition("changes[] = {")[2])
MEANWHILE = (
    *("map", "lock", "protect", "map_a_file", "close_one", "directory", "action", "limit", "file_mode_mask"),
    *("ignored", "blocked", "name", "groups", "user", "capabilities"),
)
PAGE = 4096


@contextmanager
def told(directory: Path) -> Iterator[Running]:
    """The program; `change` tells it what to do."""
    orders, mapped, held = (directory / name for name in ("orders", "mapped", "held"))
    os.mkfifo(orders)
    for path in (mapped, held):
        path.write_bytes(bytes(2 * PAGE))
    with tracee(PROGRAM, directory, str(orders), str(directory), str(mapped), str(held)) as it:
        yield it


def change(it: Running, directory: Path, what: str) -> None:
    (directory / "orders").write_text(what)
    assert it.hear() == "done"


def dumps(pid: int, *looks: Seen) -> list[Checkpoint]:
    """Several of one freeze, without the times that go on: the clocks, and when a file was last read."""
    found = []
    with frozen_tree(pid) as tree:
        for seen in looks:
            with dumped(tree, seen=seen) as dump:
                contents = dump.checkpoint.contents.items()
                still = {number: replace(content, atime_ns=0) for number, content in contents}
                found.append(replace(dump.checkpoint, contents=still, clocks=Clocks(0, 0, 0)))
    return found


def vmas(checkpoint: Checkpoint) -> tuple[Vma, ...]:
    (task,) = checkpoint.tasks
    assert task.mm is not None
    return task.mm.vmas


@pytest.mark.parametrize("what", [change for change in CHANGES if change != "root"])
def test_a_change_between_the_look_and_the_freeze_is_in_the_dump(what: str, tmp_path: Path) -> None:
    with told(tmp_path) as it:
        seen = look(it.pid).seen
        assert it.pid in seen.spaces
        assert seen.files
        change(it, tmp_path, what)
        kept, anew = dumps(it.pid, seen, NOTHING)
    assert kept == anew


@pytest.mark.parametrize("what", [None, "limit", "map", "lock", "unmap_a_part", "grow_the_mapped_file"])
def test_what_was_foreseen_stands_before_and_is_used_only_while_it_is_so(
    what: str | None, tmp_path: Path
) -> None:
    require_root()
    notes: list[Event] = []
    with told(tmp_path) as it:
        before = look(it.pid)
        assert before.forecast is not None
        forecast = read_forecast(forecast_images(before.forecast, before.written))
        if what:
            change(it, tmp_path, what)
        with (
            frozen_tree(it.pid) as source,
            dumped(source, seen=before.seen) as dump,
            dump_pages(dump) as pages,
            expecting(it.pid, ignore, new_pidns=True, cgroup=None) as birth,
            laid(forecast, birth, None) as ground,
        ):
            images = to_images(dump.whole(), written=before.written, foreseen=forecast.mappings)
            checkpoint = from_images(images, forecast.mappings)
            with built_tree(
                checkpoint, pages, notes.append, pager=None, pidns="new", birth=birth, ground=ground
            ) as tree:
                kept = tree.nursery is birth.nursery
                assert mapped(it.pid) <= mapped(tree.root_pid)  # which still has our bench
    assert kept is (what in (None, "limit"))
    assert kept is not any(isinstance(event, Note) and "foreseen" in event.text for event in notes)


def mapped(pid: int) -> set[tuple[int, str]]:
    """Every page, and how it is mapped: where one mapping ends and a like one begins depends on what is in them."""
    return {
        (page, each.perms)
        for each in proc.maps(proc.read(pid, "maps"))
        for page in range(each.start, each.end, PAGE)
    }


def test_files_that_a_new_root_directory_hides_are_refused(tmp_path: Path) -> None:
    with told(tmp_path) as it:
        seen = look(it.pid).seen
        change(it, tmp_path, "root")
        with pytest.raises(CannotBeDone, match=r"libc.* does not lead to it"):
            dumps(it.pid, seen)


def test_what_is_still_so_is_not_worked_out_again(tmp_path: Path) -> None:
    with told(tmp_path) as it:
        before = look(it.pid)
        (checkpoint,) = dumps(it.pid, seen := before.seen)
    mm = checkpoint.tasks[0].mm
    assert mm is not None
    assert mm.vmas is seen.spaces[it.pid].vmas
    assert [each.are_of(mm, access_modes(checkpoint.files)) for each in before.written] == [True]
    known = {id(resource) for resource in seen.files.values()}
    mapped = {vma.file_id for vma in vmas(checkpoint) if vma.file_id}
    assert {id(checkpoint.files[number].resource) for number in mapped} <= known


@pytest.mark.parametrize("what", ["unmap_a_part", "lock", "grow_the_mapped_file", "name"])
def test_the_change_itself_is_seen(what: str, tmp_path: Path) -> None:
    """So that the test above compares more than two dumps of before."""
    with told(tmp_path) as it:
        seen = look(it.pid).seen
        change(it, tmp_path, what)
        (checkpoint,) = dumps(it.pid, seen)
    before, now = seen.spaces[it.pid].vmas, vmas(checkpoint)
    if what == "unmap_a_part":
        assert len(now) == len(before) + 1
    elif what == "lock":
        locked = [vma for vma in now if "lo" in vma.vm_flags]
        assert [vma.length for vma in locked] == [8 * PAGE]
        assert not any("lo" in vma.vm_flags for vma in before)
    elif what == "name":  # as status has it, where it is escaped
        assert checkpoint.tasks[0].threads[0].comm == checkpoint.tasks[0].comm == "a\\b\nc\\\\n"
    else:
        resources = [file.resource for file in checkpoint.files.values()]
        sizes = {each.size for each in resources if isinstance(each, RegularFile) and "/mapped" in each.path}
        assert sizes == {3 * PAGE}


def shown(pid: int) -> dict[str, object]:
    """What /proc says of a process and a move does not change."""
    status = proc.status(proc.read(pid, "status"))
    return {
        "directory": os.readlink(f"/proc/{pid}/cwd"),
        "descriptors and mappings": moving.look(pid),
        "limits": proc.read(pid, "limits"),
        "status": [
            *(status.comm, status.uid, status.gid, status.groups, status.umask, status.sig_blocked),
            *(status.sig_ignored, status.sig_caught, status.cap_bounding, status.no_new_privs),
        ],
    }


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_what_changes_meanwhile_arrives(tmp_path: Path) -> None:
    """Through a whole move, whose last look was before all of it."""
    require_root()
    ready, go = tmp_path / "ready", tmp_path / "go"
    for fifo in (ready, go):
        os.mkfifo(fifo)
    with told(tmp_path) as it, listening("receive", "--once", "--json") as (receiver, target):
        before = shown(it.pid)
        command = [*held_up(ready, go, "freeze"), "migrate", it.pid, target, "--json"]
        with started(list(map(str, command))) as migrate:
            assert ready.read_text() == "ready\n"
            for what in MEANWHILE:
                change(it, tmp_path, what)
            after = shown(it.pid)
            go.write_text("")
            report = json.loads(migrate.communicate(timeout=30)[0])
        with killed_at_the_end(report["root_pid"]):
            assert before != after == shown(report["root_pid"])
            change(it, tmp_path, "unmap")  # and it lives
            assert receiver.wait(20) == 0
