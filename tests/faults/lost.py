"""A tree whose source is gone for good, its program (tests/programs/lost.c), and images of it."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lazyproc.hosts import Pair
from lazyproc.kernel import proc
from lazyproc.model import PAGE
from lazyproc.restore.lazytree import descendants
from tests.faults.helpers import DESTINATION, SOURCE, gone, journal, journals, sessions
from tests.live.moving import CLI, checkpoint, receiving, run_cli
from tests.live.programs import Program, running, wait_until
from tests.live.real import migrating

TOUCH_FIRST, FORK, TOUCH_ALL = 1, 2, 4
ROOT, CHILD, LATE = 0, 1, 2
PAGES = 64
FIRST = PAGES // 4
_STALLS = 512


@dataclass(frozen=True, slots=True)
class Found:
    """What one process has found of its private and its shared memory, in pages."""

    right: int
    lost: int
    wrong: int
    shared_right: int
    shared_lost: int
    shared_wrong: int


ALL_RIGHT = Found(PAGES, 0, 0, PAGES, 0, 0)


@dataclass(slots=True)
class Lost:
    """A tree at the destination; `root` as the test sees it."""

    pair: Pair
    program: Program
    session: str
    root: int
    images: Path

    def order(self, order: int, *workers: int) -> None:
        """Have it done by these processes."""
        _order(self.program, order, *workers)

    def found(self, worker: int) -> Found:
        return Found(*_fields(self.program, worker)[:6])

    def info(self) -> dict[str, object]:
        """What `lazyproc sessions` says."""
        (only,) = sessions(self.pair.destination)
        return only

    def pids(self) -> list[int]:
        """Of the tree, as the test sees them, the root first."""
        return [pid for pid in descendants([self.root]) if not gone(pid)]

    def missing(self) -> int:
        """Pages of the program that the kernel does not have: of the root and the child, and once the shared."""
        root, child = self.pids()[:2]
        private, shared = _fields(self.program, ROOT)[7:]
        came = _present(root, shared) | _present(child, shared)
        return 3 * PAGES - len(_present(root, private)) - len(_present(child, private)) - len(came)


def _fields(program: Program, worker: int) -> tuple[int, ...]:
    block = program.watch.path.read_bytes()
    return struct.unpack_from("<9Q", block, _STALLS + 8 * 16 * (worker + 1))


def _order(program: Program, order: int, *workers: int) -> None:
    with open(program.watch.path, "r+b", buffering=0) as file:
        before = struct.unpack("<Q", os.pread(file.fileno(), 8, _STALLS))[0]
        os.pwrite(file.fileno(), struct.pack("<Q", before | order), _STALLS)
    wait_until(
        lambda: all(_fields(program, worker)[6] & order for worker in workers),
        f"order {order} is followed by {workers}: {[_fields(program, worker) for worker in workers]}",
    )


def _present(pid: int, start: int) -> set[int]:
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        file.seek(start // PAGE * 8)
        entries = struct.unpack(f"<{PAGES}Q", file.read(PAGES * 8))
    return {number for number, entry in enumerate(entries) if entry >> 63}


@contextmanager
def program_of(pair: Pair) -> Iterator[Program]:
    with running("lost", PAGES, directory=pair.shared, host=pair.source, exclusive=True) as program:
        program.watch.wait_beats()
        yield program


@contextmanager
def lost(pair: Pair, *, imaged: bool = False, moved_on: bool = False) -> Iterator[Lost]:
    """A quarter of its pages has come before."""
    with incomplete(pair, imaged=imaged, moved_on=moved_on) as it:
        it.order(TOUCH_FIRST, ROOT, CHILD)
        run_cli(pair.source, "abort", it.session)
        wait_until(lambda: "source is lost" in str(it.info()["reason"]), "the loss is noticed")
        yield it


@contextmanager
def incomplete(pair: Pair, *, imaged: bool = False, moved_on: bool = False) -> Iterator[Lost]:
    """Its source is there, and nothing is brought but what is touched. `imaged`: it is stopped, checkpointed and moved
    as it is, unless it has `moved_on` meanwhile.
    """
    images = pair.shared / "images"
    with program_of(pair) as program:
        if imaged:
            _stop(program)
            checkpoint(pair.source, program.pid, images, "--leave-running")
        if moved_on:
            _go_on([program.pid, *proc.children_of(program.pid, program.pid)])
            program.watch.wait_beats()
        with (
            receiving(pair.destination) as receiver,
            migrating(pair.source, receiver, program.pid, "--no-bulk") as journey,
        ):
            journey.wait_running()
            facts = journal(pair.destination, DESTINATION)
            root = pair.destination.pid(facts["tree"]["root_pid"])
            it = Lost(pair, program, facts["id"], root, images)
            try:
                _go_on(it.pids())
                program.watch.wait_beats()
                yield it
            finally:
                for host, role in ((pair.destination, DESTINATION), (pair.source, SOURCE)):
                    if journals(host, role):
                        host.run([*CLI, "abort", it.session], stdout=subprocess.DEVNULL, check=False)
                with suppress(ProcessLookupError):
                    os.kill(root, signal.SIGKILL)


def _go_on(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def _stop(program: Program) -> None:
    for pid in [program.pid, *proc.children_of(program.pid, program.pid)]:
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda pid=pid: proc.stat(proc.read(pid, "stat")).state == "T", f"pid {pid} stands still")  # type: ignore[misc]
