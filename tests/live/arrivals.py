"""Processes that arrive lazily under a test's control: each page comes when it is touched and the test lets it."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lazyproc.dump.checkpoint import checkpoint
from lazyproc.events import ignore
from lazyproc.images.convert import from_images, memory_objects
from lazyproc.images.files import Folder
from lazyproc.kernel import proc
from lazyproc.model import PAGE, Checkpoint, MemoryObject, ObjectKind
from lazyproc.pages.images import ImagePages
from lazyproc.restore.lazy import finish, introduce
from lazyproc.restore.lazytree import LazyTree
from lazyproc.restore.tree import BuiltTree, Pidns, built_tree
from lazyproc.runs import Segment
from lazyproc.trace import Fault
from lazyproc.uffd.pager import Counters, Pager
from tests.live.lazy_rig import Server, balanced, faults
from tests.live.programs import Phase, Watch, running, wait_until

END_S = 15.0
NOTHING: Mapping[MemoryObject, int] = {}


@dataclass(frozen=True, slots=True)
class Left:
    """A program that was dumped and ended: its images, and the status block that its copy goes on with."""

    images: Path
    watch: Watch
    pid: int

    def checkpoint(self) -> Checkpoint:
        return from_images(Folder(self.images).read())


def leave(name: str, *arguments: object, directory: Path) -> Left:
    """Start a program of tests/programs, wait until it checks, and dump it."""
    with running(name, *arguments, directory=directory) as program:
        program.watch.wait_beats(1)
        return dump(program.pid, program.watch, directory)


def dump(pid: int, watch: Watch, directory: Path) -> Left:
    images = directory / "images"
    checkpoint(pid, images, leave_running=False, tcp_close=False, listener=ignore)
    return Left(images, watch, pid)


class LatePages(Server):
    """A page server for the few pages of images that a test wants to be late."""

    def __init__(self, source: ImagePages) -> None:
        super().__init__({})
        self._source = source

    def page(self, key: int, addr: int) -> bytes:
        return self._source.read(MemoryObject(ObjectKind(key & 0xFF), key >> 8), addr, 1)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A restored tree whose lazy pages come on demand only. `pid` is its root, as we see it."""

    tree: BuiltTree
    remains: LazyTree
    pager: Pager
    source: ImagePages
    watch: Watch
    _late: LatePages
    _faults: list[Fault] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.tree.root_pid

    def start(self, *, bulk: bool = False) -> None:
        """From now on pages come; before, whoever touches a missing one waits."""
        self.pager.start(bulk=bulk)

    def go(self) -> None:
        """The signal for which the programs of tests/programs wait."""
        os.kill(self.pid, signal.SIGTERM)

    def wait_for(self, addr: int) -> None:
        """Until somebody waits for a late page."""
        self._late.wait_for("urgent", addr)

    def let_come(self, addr: int) -> None:
        self._late.hold("urgent", addr).set()

    def page_at_source(self, addr: int) -> bytes:
        """What the root must see at a page-aligned address."""
        return self.source.read(MemoryObject(ObjectKind.TASK, self.tree.checkpoint.root.vpid), addr, 1)

    def faults(self) -> list[Fault]:
        """All faults so far that are over."""
        self._faults.extend(faults(self.pager))
        return self._faults

    def was_missed(self, addr: int) -> bool:
        return any(fault.addr == addr for fault in self.faults())

    def drain(self) -> None:
        """Started in bulk: let all pages come, and give the memory back to the kernel alone."""
        assert self.pager.wait(END_S), self.pager.reason
        finish(self.pager, self.remains)

    def wait_exit(self) -> int:
        """The root's exit status, which the nursery passes on."""
        nursery = self.tree.nursery.pid
        assert ends(nursery), f"still runs: {self.watch.read()}; the last page was {self.faults()[-1:]}"
        return os.waitstatus_to_exitcode(os.waitpid(nursery, 0)[1])

    def end_well(self) -> Counters:
        """It has done its last check, well, and its end is the end of the pager too: each page has been counted."""
        status = self.wait_exit()
        assert status == 0, f"exit status {status}: {self.watch.read()}"
        assert self.watch.read().phase is Phase.ENDED
        assert self.pager.wait(END_S), self.pager.reason
        assert balanced(self.pager)
        return self.pager.counters()


@contextmanager
def arriving(
    left: Left,
    *,
    pidns: Pidns = "auto",
    start: bool = True,
    late: Mapping[MemoryObject, int] = NOTHING,
    changed: Checkpoint | None = None,
) -> Iterator[Arrival]:
    """Restore what was left, or the checkpoint it was `changed` to; everything is killed at the end.

    Pages come from the images at once, but one page of each object in `late` only after `let_come`.
    """
    wanted = changed or left.checkpoint()
    with ExitStack() as stack:
        source = stack.enter_context(ImagePages(Folder(left.images), memory_objects(wanted)))
        server = stack.enter_context(closing(LatePages(source)))
        pager = stack.enter_context(Pager(trace=True))
        with built_tree(wanted, source, ignore, pager=pager, pidns=pidns) as tree:
            introduce(pager, tree, ignore)
            stack.callback(_let_go, tree, pager)
            pager.serve_segments(_on_time(source.segments(), late))
            for addr in late.values():
                server.hold("urgent", addr)
            pager.serve_remote(*server.connect())
            pager.apply_map(tree.checkpoint.memory)
            arrival = Arrival(tree, tree.lazy_tree, pager, source, left.watch, server)
            if start:
                arrival.start()
            tree.release()
        yield arrival


def _on_time(segments: Iterable[Segment], late: Mapping[MemoryObject, int]) -> Iterator[Segment]:
    """The segments without the late pages."""
    holes = {obj.key: addr for obj, addr in late.items()}
    for segment in segments:
        hole = holes.get(segment.key, segment.end)
        if not segment.start <= hole < segment.end:
            yield segment
            continue
        if hole > segment.start:
            yield segment._replace(end=hole)
        if hole + PAGE < segment.end:
            yield segment._replace(start=hole + PAGE, offset=segment.offset + hole + PAGE - segment.start)


def _let_go(tree: BuiltTree, pager: Pager) -> None:
    """The processes first: none of them may see its memory without a pager."""
    for site in tree.sites.values():
        with suppress(ProcessLookupError):
            os.kill(site.pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(tree.nursery.pid, 0)
    pager.abandon()


def ends(pid: int) -> bool:
    """Whether a process, which nobody has waited for, ends in time."""
    pidfd = os.pidfd_open(pid)
    try:
        return bool(select.select([pidfd], [], [], END_S)[0])
    finally:
        os.close(pidfd)


def waits_for_page(pid: int, tid: int | None = None) -> bool:
    """Whether a thread is held up by userfaultfd (handle_userfault, fs/userfaultfd.c)."""
    return proc.read(pid, f"task/{tid or pid}/wchan") == b"handle_userfault"


def wait_for_fault(pid: int) -> None:
    wait_until(lambda: waits_for_page(pid), f"pid {pid} waits for a page")
