"""A folder of images becomes a running tree, all at once or lazily."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from lazyproc.errors import LazyprocError, LostAfterCommit, Parked, UsageError
from lazyproc.events import Listener, StateChanged, ignore
from lazyproc.facts import asdict, dataclass, field, replace
from lazyproc.images.convert import from_images, memory_objects
from lazyproc.images.files import EXTRAS, Folder
from lazyproc.images.foreign import network_lock
from lazyproc.kernel.cgroup import remove
from lazyproc.kernel.fds import AMPLE, make_room
from lazyproc.model import Checkpoint, Extent, MemoryObject
from lazyproc.pages import PageSource
from lazyproc.pages.images import ImagePages
from lazyproc.restore.altered import all_ended, all_stopped
from lazyproc.restore.crius import fitted, taken_over
from lazyproc.restore.finishing import Finishing
from lazyproc.restore.handing import hand_over, shared_at_once
from lazyproc.restore.lazy import introduce
from lazyproc.restore.lazytree import LazyTree
from lazyproc.restore.tree import NONE_GIVEN, BuiltTree, Pidns, built_tree
from lazyproc.runs import Extents
from lazyproc.uffd.pager import Counters, Pager, PagerState
from lazyproc.uffd.planner import follow
from lazyproc.uffd.policy import RECORDED, Chunk, Policy, blocks, named

LOOK_S = 0.02
PLACE_S = 0.1  # how long the tree waits for its recorded pages at most, before its first instruction


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore measured, in the words of MigrateReport. Without a pager every page was eager: None."""

    root_pid: int
    root_vpid: int
    total_ms: float  # until every page was there, or the root had ended
    ended: bool
    pages_total: int | None = None
    pages_zero: int | None = None
    pages_eager: int | None = None
    pages_urgent: int | None = None
    pages_bulk: int | None = None
    pages_packed: int | None = None
    pages_dropped: int | None = None
    pages_poisoned: int | None = None
    fault_us: Mapping[str, float] | None = None


class Served(Protocol):
    """A server elsewhere that has the lazy pages of images whose folder is here."""

    runs: bool  # here: to be said before it does

    def pages(self, images: ImagePages) -> PageSource:
        """For what has to be there before the tree runs."""
        ...

    def begin(self, pager: Pager, images: ImagePages) -> None:
        """All others come to the pager from now on."""
        ...

    def finish(self) -> None:
        """Every page is here."""
        ...

    def lost(self, root_pid: int, missing: int, reason: str) -> LazyprocError:
        """What to say when no page comes any more."""
        ...


@dataclass(slots=True)
class Restored:
    """A tree that runs. `pager` is None when nothing was lazy."""

    tree: LazyTree
    started: float
    pager: Pager | None
    drained: bool = field(default=False, kw_only=True)  # `wait_drained` has said so
    settle: Callable[[], object] = field(
        default=lambda: None, kw_only=True
    )  # before it gives back what it keeps
    served: Served | None = field(default=None, kw_only=True)
    _listener: Listener = field(default=ignore, kw_only=True)
    _finishing: Finishing | None = field(default=None, kw_only=True)  # once every page is there
    _plan: Callable[[], Iterable[Chunk]] | None = field(default=None, kw_only=True)  # until the pager has it
    _status: int | None = field(default=None, kw_only=True)

    def wait_drained(self, timeout: float | None = None) -> bool:
        """True when every page is there and nothing of ours is left in the tree; False after `timeout` seconds (None:
        without end). Raises LostAfterCommit.

        The first call asks the policy for its plan; until then bulk goes by address. Raises what the policy raises.
        """
        if self.pager is None:
            return True
        if self._plan is not None:
            plan, self._plan = self._plan, None
            self.pager.plan(plan())
        if not self.pager.wait(timeout):
            self._demand_source(self.pager)
            return False
        if not self._give_back(self.pager, timeout):
            return False
        self.drained = True
        if self.served is not None:
            self.served.finish()
        return True

    def _give_back(self, pager: Pager, timeout: float | None) -> bool:
        """False: not yet, after `timeout` seconds."""
        if self._finishing is None:
            self.settle()
            self._finishing = Finishing(pager, self.tree, self._listener)
        end = None if timeout is None else time.monotonic() + timeout
        while not self._finishing.attempt():
            if end is not None and time.monotonic() >= end:
                return False
            time.sleep(LOOK_S)
        return True

    def _demand_source(self, pager: Pager) -> None:
        if pager.state is PagerState.LOST:
            if self.served is not None:
                raise self.served.lost(self.root_pid, pager.counters().remaining, pager.reason)
            raise LostAfterCommit(
                f"{pager.counters().remaining} pages cannot be had ({pager.reason}), and who touches one of them waits",
                where=f"pid {self.root_pid}",
                remedy="end it with kill -9, and restore it again when its images are whole",
            )

    def counters(self) -> Counters | None:
        return self.pager.counters() if self.pager else None

    def wait_root(self, *, block: bool = True) -> int | None:
        """The root's exit status as a shell gives it (128 + signal), None while it runs and `block` is False."""
        if self._status is None:
            pid, status = os.waitpid(self.tree.nursery_pid, 0 if block else os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    @property
    def root_pid(self) -> int:
        return self.tree.root_pid

    def forward(self, sig: signal.Signals) -> None:
        os.kill(self.root_pid, sig)

    def report(self) -> RestoreReport:
        """The figures so far."""
        total_ms = (time.monotonic() - self.started) * 1e3
        report = RestoreReport(self.root_pid, self.tree.root_vpid, total_ms, ended=self._status is not None)
        counters = self.counters()
        if counters is None:
            return report
        return replace(report, **counters.pages(), fault_us=asdict(counters.fault_us))


@contextmanager
def restore(
    directory: Path,
    *,
    lazy: bool,
    pidns: Pidns,
    policy: str,
    listener: Listener,
    bulk: bool = True,
    cgroup: str | None = None,
    trace: Path | str | None = None,
    record: Path | str | None = None,
    stopped: bool = False,
    ready: Callable[[int], object] = lambda pid: None,
    lazy_pages: socket.socket | None = None,
    tcp_close: bool = False,
    served: Served | None = None,
    given: Mapping[str, int] = NONE_GIVEN,
    sibling: bool = False,
    root: str | None = None,
) -> Iterator[Restored]:
    """Restore the tree in `directory`; it runs when the context is entered, or is `stopped` as by SIGSTOP. Without
    `bulk` only what is touched comes. `ready` is called with the root's pid when the tree is complete and has not run;
    when it raises, the tree is ended. Private memory that can be lazy is brought by the daemon of `criu lazy-pages`, or
    ours, behind the connection `lazy_pages`. With `tcp_close` all its TCP connections have ended. Of
    the `given` descriptors each takes the place of what the tree had open under that name: a path without its first
    slash, "pipe:[INODE]", "socket:[INODE]", or how it was called when it was left outside (lazyproc/outside.py). With
    `sibling` the root is a child of our parent, which reaps it: there is nothing to wait for here. With
    `root` that is its root directory, and what the images name is looked for there.

    The tree is in a cgroup of its own, or in `cgroup`, a path as in /proc/PID/cgroup, which is made when it is missing.
    Faults, which only a lazy restore has, are written to `trace` and to `record` (docs/trace.md). With the policy
    `recorded:FILE` the pages that another restore of these images recorded in FILE come first.

    Leaving the context before `wait_drained` leaves missing pages parked: whoever touches one waits. Raises
    ImageError, RestoreError, HostLacks, UsageError (no such policy, no path of a cgroup), LazyprocError (`trace` or
    `record` cannot be written); then nothing half-built is left. Parked: it was interrupted in the first moment of the
    tree, which runs, its missing pages parked; an interrupt that comes later leaves it so as well.
    """
    started = time.monotonic()
    known = None if policy.startswith(RECORDED) else named(policy)
    files = [path for path in (trace, record) if path is not None]
    if files and not lazy:
        raise UsageError("only a lazy restore has faults to trace", where=str(files[0]), remedy="add --lazy")
    folder = Folder(directory)
    images = folder.read()
    checkpoint = from_images(images)
    if lazy_pages is not None:
        checkpoint = shared_at_once(checkpoint)
    if tcp_close:
        checkpoint = all_ended(checkpoint)
    if stopped:
        checkpoint = all_stopped(checkpoint)
    chosen = known or _recorded(policy, checkpoint)
    with ExitStack() as stack:
        start_recording = stack.enter_context(_recording(files, listener)) if files else None
        local = stack.enter_context(ImagePages(folder, memory_objects(checkpoint)))
        source = served.pages(local) if served is not None else local
        if EXTRAS not in images:
            checkpoint = fitted(checkpoint, source)
        make_room(AMPLE)
        pager = stack.enter_context(Pager(trace=bool(files))) if lazy else None
        handed = lazy_pages is not None
        with (
            taken_over(checkpoint, network_lock(images)) as let_go,
            built_tree(
                checkpoint,
                source,
                listener,
                pager=pager,
                handed=handed,
                pidns=pidns,
                cgroup=cgroup,
                given=given,
                sibling=sibling,
                root=root,
            ) as tree,
        ):
            stack.callback(remove, tree.lazy_tree.groups)  # in case it ends before us
            if pager is not None:
                introduce(pager, tree, listener)
                if served is None:
                    pager.serve_segments(local.segments())
                else:
                    served.begin(pager, local)
                pager.plan(blocks(chosen.first))
                pager.start(bulk=bulk)
                if chosen.first and bulk:  # the tree will want them at once, and no map is needed
                    pager.wait_plan(PLACE_S)
            remains = tree.lazy_tree
            ready(tree.root_pid)
            if lazy_pages is not None:
                hand_over(lazy_pages, tree)
            with _said_to_run(tree):
                if served is not None:
                    served.runs = True
                let_go()
                tree.release()
                if start_recording is not None and pager is not None:
                    start_recording(pager)
                listener(StateChanged("running", time.monotonic()))
                if pager is not None:
                    # Only now: content is served without the map, and the map's cost grows with memory.
                    pager.apply_map(tree.checkpoint.memory)
                    if chosen.reaction is not None:
                        follow(pager, chosen.reaction())
        memory = tree.checkpoint.memory
        yield Restored(
            remains,
            started,
            pager,
            served=served,
            _listener=listener,
            _plan=lambda: chosen.order(_lazy(memory)),
        )


@contextmanager
def _said_to_run(tree: BuiltTree) -> Iterator[None]:
    """Once the tree runs an interrupt is no longer the end of it, and must not say so. Raises Parked."""
    try:
        yield
    except KeyboardInterrupt:
        if not tree.released:
            raise
        raise Parked(
            "interrupted when it had begun to run; who touches a page that has not come waits",
            where=f"pid {tree.root_pid}",
            remedy="end it with kill -9, and restore it again",
        ) from None


@contextmanager
def _recording(paths: Sequence[Path | str], listener: Listener) -> Iterator[Callable[[Pager], None]]:
    """Trace files, all with the same faults, and what begins to fill them from a pager that runs."""
    from lazyproc.trace import Clock, TraceFile  # json, threads: nobody else's start should wait for them
    from lazyproc.uffd.recorder import Recorder

    with ExitStack() as stack:
        files = [stack.enter_context(TraceFile(path, listener)) for path in paths]
        clock = Clock.now()
        for file in files:
            file.begin("", clock)

        def write(records: bytes, lost: int) -> None:
            for file in files:
                file.write(records, lost)

        def record(pager: Pager) -> None:
            stack.callback(Recorder(pager, write).close)

        yield record


def _recorded(policy: str, checkpoint: Checkpoint) -> Policy:
    from lazyproc.restore.workingset import policy_of  # json: nobody else's start should wait for it

    return policy_of(policy, checkpoint.memory)


def _lazy(memory: Mapping[MemoryObject, Sequence[Extent]]) -> Mapping[MemoryObject, Extents]:
    return {obj: Extents.of(runs).where(lazy=True) for obj, runs in memory.items()}
