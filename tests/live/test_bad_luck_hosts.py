"""A host that lacks what a move takes: the kernel's calls, the same files, memory. Found before anything is changed."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lazyproc.hosts import Pair
from lazyproc.kernel import proc
from lazyproc.kernel.nursery import BIRTH_NUMBERS, TRANSPORT_FD
from lazyproc.migrate.prepare import offer_of
from tests.live.bad_luck import PACED, lazyproc, migrated, moves, says, unchanged, unharmed, without
from tests.live.moving import receiving
from tests.live.programs import BINARIES, Program, compile_program, running, wait_until
from tests.needs import lacking

CGROUPS = Path("/sys/fs/cgroup/memory")
MAP_NORESERVE = 0x4000
LIMIT = 70 << 20  # the program has 10 MiB, and 64 are to stay free


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running(*PACED, directory=pair.shared, host=pair.source) as started:
        yield started


@pytest.mark.parametrize(
    ("call", "name"), [("pidfd_getfd", "pidfd_getfd(2)"), ("pagemap_scan", "PAGEMAP_SCAN")]
)
def test_a_source_with_an_old_kernel(pair: Pair, program: Program, call: str, name: str) -> None:
    pid = pair.source.vpid(program.pid)
    with unchanged(pair.source, pair.destination), unharmed(program):
        for argv in (["checkpoint", pid, "-D", "/tmp/images"], ["migrate", pid, "127.0.0.1:1"]):
            says(
                lazyproc(pair.source, *argv, by=without(call)), 3, f"this kernel has no {name}", "use Linux "
            )


@pytest.mark.parametrize(
    ("call", "name"), [("userfaultfd", "userfaultfd(2)"), ("pidfd_getfd", "pidfd_getfd(2)")]
)
def test_a_destination_with_an_old_kernel(pair: Pair, program: Program, call: str, name: str) -> None:
    with receiving(pair.destination, by=without(call)) as receiver:
        with unchanged(pair.source, pair.destination), unharmed(program):
            says(migrated(pair, receiver, program.pid), 3, receiver.address, f"this kernel has no {name}")
        assert f"this kernel has no {name}" in receiver.notes()


def test_a_destination_with_few_descriptors(pair: Pair, program: Program) -> None:
    """Too few for a restore to begin, with which `receive` does not begin either, and the fewest with which it can."""
    words = ("receive", "--listen", f"{pair.destination.address}:0", "--insecure")
    done = lazyproc(pair.destination, *words, by=("prlimit", "--nofile=44:44"))
    says(done, 3, "no more than 44 descriptors", "LimitNOFILE=")
    count = TRANSPORT_FD + BIRTH_NUMBERS
    with receiving(pair.destination, by=("prlimit", f"--nofile={count}:{count}")) as receiver:
        moves(pair, receiver, program)


def test_a_lazy_restore_with_an_old_kernel(pair: Pair, program: Program) -> None:
    source, images = pair.source, pair.source.scratch / "images"
    assert not lazyproc(source, "checkpoint", source.vpid(program.pid), "-D", images).returncode
    program.process.wait()
    for call, name in (("userfaultfd", "userfaultfd(2)"), ("pidfd_getfd", "pidfd_getfd(2)")):
        with unchanged(source):
            done = lazyproc(source, "restore", "-D", images, "--lazy", by=without(call))
            says(done, 3, f"this kernel has no {name}")


def in_a_place_where(script: str) -> tuple[str, ...]:
    """A mount namespace of its own in which `script` has been run."""
    return ("unshare", "--mount", "sh", "-ec", f'{script}\nexec "$@"', "sh")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("mount -t tmpfs none {folder}", ("is not on this host", "copy {path} to this host")),
        ("mount --bind {other} {path}", ("{path}", "another build")),
        ("mount --bind {longer} {path}", ("{path}", "bytes")),
    ],
    ids=["missing", "another build", "another size"],
)
def test_another_executable_there(pair: Pair, program: Program, change: str, words: tuple[str, ...]) -> None:
    path = compile_program("memory_random")
    longer = pair.destination.outside / "longer"
    shutil.copy(path, longer)
    with longer.open("ab") as file:
        file.write(bytes(4096))
    names = {"path": path, "folder": BINARIES, "other": compile_program("threads"), "longer": longer}
    place = in_a_place_where(change.format_map(names))
    with (
        receiving(pair.destination, by=place) as receiver,
        unchanged(pair.source, pair.destination),
        unharmed(program),
    ):
        done = migrated(pair, receiver, program.pid)
        says(done, 3, receiver.address, str(path), *(word.format_map(names) for word in words))


@contextmanager
def memory_limited(name: object, limit: int = LIMIT) -> Iterator[Path]:
    """A memory cgroup for what a test starts."""
    if not (CGROUPS / "memory.limit_in_bytes").exists():
        lacking("no memory cgroup can be made here", "mount the memory controller at /sys/fs/cgroup/memory")
    group = CGROUPS / f"lazyproc-test-{name}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        wait_until(lambda: _removed(group), "the cgroup is empty")


def _removed(group: Path) -> bool:
    with suppress(OSError):
        group.rmdir()
    return not group.exists()


@pytest.mark.parametrize("overcommit", [False, True])
def test_too_little_memory_there(pair: Pair, program: Program, overcommit: bool) -> None:
    with memory_limited(os.getpid()) as group:
        by = in_a_place_where(f"echo $$ > {group}/cgroup.procs")
        options = ("--overcommit",) if overcommit else ()
        with receiving(pair.destination, *options, by=by) as receiver:
            if overcommit:
                moves(pair, receiver, program)
                return
            with unchanged(pair.source, pair.destination), unharmed(program):
                done = migrated(pair, receiver, program.pid)
                says(
                    done,
                    3,
                    receiver.address,
                    f"cgroup /{group.name} ",
                    "MiB available",
                    "raise its memory.limit_in_bytes, or use receive --overcommit",
                )


def test_memory_that_was_never_touched_does_not_count() -> None:
    """A terabyte of address space needs no terabyte there."""
    with mmap.mmap(-1, 1 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE):
        offer = offer_of({os.getpid(): proc.smaps(proc.read(os.getpid(), "smaps"))})
    assert offer.pages < 1 << 20
