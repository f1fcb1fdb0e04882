"""The shape of a rebuilt process: its numbers in a new pid namespace, and its address space down to the last flag."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from lazyproc.errors import RestoreError
from lazyproc.kernel import proc
from lazyproc.model import PAGE, Checkpoint, Vma, VmaKind
from tests.live.arrivals import Left, arriving, dump, ends, leave
from tests.live.programs import Watch, compile_program, running, wait_until

# What the kernel says of the layout in /proc/PID/stat; the numbers of signals and times come and go.
LAYOUT = (
    "start_code", "end_code", "start_data", "end_data", "start_brk", "start_stack",
    "arg_start", "arg_end", "env_start", "env_end",
)  # fmt: skip


def layout_of(pid: int) -> dict[str, object]:
    stat = proc.stat(proc.read(pid, "stat"))
    return {name: getattr(stat, name) for name in LAYOUT} | {
        "exe": os.readlink(f"/proc/{pid}/exe"),
        "auxv": proc.auxv(proc.read(pid, "auxv")),
        "cmdline": proc.read(pid, "cmdline"),
        "environ": proc.read(pid, "environ"),
        "comm": stat.comm,
    }


class Mapping(NamedTuple):
    """A mapping, or several of the same kind side by side."""

    start: int
    end: int
    perms: str
    base: int  # of a file: where its first byte would lie
    path: str
    flags: frozenset[str]


def mappings_of(pid: int) -> list[Mapping]:
    """Every mapping with its VmFlags. But "ac" (VM_ACCOUNT): of what was writable once and is not any more the kernel
    has counted the pages, for its own limit; mapped anew as it is now they are not counted, and merge."""
    found: list[Mapping] = []
    for entry, *_, flags in proc.smaps(proc.read(pid, "smaps")):
        base = entry.start - entry.offset if entry.inode else 0
        mapping = Mapping(entry.start, entry.end, entry.perms, base, entry.path, flags - {"ac"})
        if found and (found[-1].end, *found[-1][2:]) == (mapping.start, *mapping[2:]):
            mapping = mapping._replace(start=found.pop().start)
        found.append(mapping)
    return found


# --- numbers ----------------------------------------------------------------------------------------------------


def test_threads_have_their_numbers_in_a_new_pid_namespace_and_its_own_proc(tmp_path: Path) -> None:
    left = leave("trap_restore", directory=tmp_path)
    with arriving(left, pidns="new") as it:
        tids = proc.task_ids(it.pid)
        inner = [proc.status(proc.read(it.pid, f"task/{tid}/status")).ns_pid for tid in tids]
        wanted = [thread.tid for thread in left.checkpoint().root.threads]
        assert sorted(numbers[1] for numbers in inner) == sorted(wanted)
        assert proc.status(proc.read(it.tree.nursery.pid, "status")).ns_pid[-1] == 1
        it.watch.wait_beats(1)
        it.go()
        it.end_well()


def test_the_first_process_passes_on_how_the_root_ended(tmp_path: Path) -> None:
    with arriving(leave("trap_restore", directory=tmp_path), pidns="new") as it:
        os.kill(it.pid, signal.SIGKILL)
        assert it.wait_exit() == 128 + signal.SIGKILL


def test_nothing_survives_the_first_process_of_its_namespace(tmp_path: Path) -> None:
    with arriving(leave("tree", directory=tmp_path), pidns="new") as it:
        it.watch.wait_beats(1)
        everybody = [os.pidfd_open(site.pid) for site in it.tree.sites.values()]
        try:
            os.kill(it.tree.nursery.pid, signal.SIGKILL)
            assert ends(it.tree.nursery.pid)
            for pidfd in everybody:
                with pytest.raises(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, 0)
        finally:
            for pidfd in everybody:
                os.close(pidfd)


def test_a_tree_whose_root_is_number_1(tmp_path: Path) -> None:
    """The first clone3 in a pid namespace can make nobody but number 1."""
    watch = Watch.create(tmp_path / "trap_restore.status", exclusive=False)
    argv = [
        "unshare",
        "--pid",
        "--fork",
        "--mount-proc",
        str(compile_program("trap_restore")),
        str(watch.path),
    ]
    null = subprocess.DEVNULL
    with subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, start_new_session=True) as process:
        try:
            watch.wait_running()
            (first,) = proc.children_of(process.pid, process.pid)
            left = replace(dump(first, watch, tmp_path), pid=1)
            process.wait()
        finally:
            process.kill()
    assert left.checkpoint().root.vpid == 1
    with arriving(left) as it:
        assert it.pid == it.tree.nursery.pid
        it.watch.wait_beats(1)
        it.go()
        it.end_well()


# --- memory layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trap_restore", "memory_static", "threads"])
def test_every_mapping_and_every_field_of_the_mm_is_what_it_was(name: str, tmp_path: Path) -> None:
    """With all pages there the flags are equal to the last one: of thread stacks, of the guards, of the vdso."""
    with running(name, directory=tmp_path) as program:
        program.watch.wait_beats(1)
        os.kill(program.pid, signal.SIGSTOP)
        wait_until(lambda: proc.stat(proc.read(program.pid, "stat")).state == "T", "it is stopped")
        layout, mappings = layout_of(program.pid), mappings_of(program.pid)
        left = dump(program.pid, program.watch, tmp_path)
    with arriving(left, start=False) as it:
        assert layout_of(it.pid) == layout
        it.start(bulk=True)
        it.drain()
        assert mappings_of(it.pid) == mappings
        os.kill(it.pid, signal.SIGCONT)
        it.watch.wait_beats(1)
        it.go()
        assert it.wait_exit() == 0
        it.watch.wait_ended()


def test_a_vdso_that_lands_elsewhere_is_an_error(tmp_path: Path) -> None:
    """ARCH_MAP_VDSO_64 takes its address as a hint; something is in the way."""
    left = leave("trap_restore", directory=tmp_path)
    with (
        pytest.raises(RestoreError, match="the vdso could not be put at its old address"),
        arriving(left, changed=blocked_vdso(left)),
    ):
        pass


def blocked_vdso(left: Left) -> Checkpoint:
    """The checkpoint with a mapping more, at the first page of what belongs to the vdso."""
    checkpoint = left.checkpoint()
    task = checkpoint.root
    assert task.mm is not None
    special = [v for v in task.mm.vmas if v.kind in (VmaKind.VDSO, VmaKind.VVAR, VmaKind.VVAR_VCLOCK)]
    first = min(special, key=lambda vma: vma.start)
    obstacle = Vma(first.start, first.start + PAGE, 3, 0x22, VmaKind.ANON)
    vmas = tuple(sorted((*task.mm.vmas, obstacle), key=lambda vma: vma.start))
    changed = replace(task, mm=replace(task.mm, vmas=vmas))
    return replace(checkpoint, tasks=(changed, *checkpoint.tasks[1:]))
