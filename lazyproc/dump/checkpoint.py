"""A process tree into a folder of CRIU-format images."""

from __future__ import annotations

import builtins
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from lazyproc.dump.before import observed_sleeps
from lazyproc.dump.explain import examine_again
from lazyproc.dump.freeze import FREEZE_MS, FrozenTree, frozen_tree
from lazyproc.dump.gather import Dump, dumped
from lazyproc.dump.late import late_signals
from lazyproc.dump.permits import ALL, Permits
from lazyproc.dump.source import DumpPages, dump_pages
from lazyproc.dump.tcp import silence
from lazyproc.events import Listener, Note, StateChanged, StepDone, ignore
from lazyproc.facts import dataclass, replace
from lazyproc.images.convert import to_images
from lazyproc.images.draft import Draft, filled
from lazyproc.images.files import Folder
from lazyproc.images.stats import dump_stats
from lazyproc.kernel.deaf import deaf
from lazyproc.kernel.netfilter import DUMPED, Hold
from lazyproc.model import PAGE, Checkpoint
from lazyproc.outside import name_of
from lazyproc.pages import storing
from lazyproc.pages.storing import Store, Stored


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """What was written; times in milliseconds."""

    root_pid: int
    root_vpid: int
    tasks: int
    threads: int
    pages_total: int
    frozen_ms: float
    total_ms: float
    stopping_ms: float  # of frozen_ms: until the last thread stood still
    writing_ms: float  # of frozen_ms: the pages
    bytes: int  # of pages and images

    def stats(self) -> builtins.bytes:
        """The same as CRIU's image stats-dump."""
        stopping, frozen, writing = (
            round(ms * 1e3) for ms in (self.stopping_ms, self.frozen_ms, self.writing_ms)
        )
        return dump_stats(
            stopping_us=stopping,
            frozen_us=frozen,
            describing_us=max(0, frozen - stopping - writing),
            writing_us=writing,
            pages=self.pages_total,
        )


@dataclass(frozen=True, slots=True)
class Written:
    """A tree that stands still, and the images of it; see `written`."""

    tree: FrozenTree
    dump: Dump
    pages: DumpPages
    whole: Checkpoint
    stored: Stored
    hold: Hold | None
    frozen_at: float  # CLOCK_MONOTONIC in seconds, before the first stop

    def end(self) -> None:
        """The tree ends here. With `hold` the peers of its connections hear nothing of it."""
        if self.hold is not None:
            self.hold.keep_only(self.dump.outside)
            silence(self.dump.connections)
        self.tree.kill()
        self.dump.remove_segments()

    def report(self, started: float, thawed: float) -> CheckpointReport:
        """`started` and `thawed` as `frozen_at`; the latter is when it ran on or had ended."""
        whole, stored = self.whole, self.stored
        return CheckpointReport(
            root_pid=next(iter(self.tree.tasks)),
            root_vpid=whole.root.vpid,
            tasks=len(whole.tasks),
            threads=sum(len(task.threads) for task in whole.tasks),
            pages_total=stored.pages,
            frozen_ms=(thawed - self.frozen_at) * 1e3,
            total_ms=(time.monotonic() - started) * 1e3,
            stopping_ms=self.tree.frozen_at_ns / 1e6 - self.frozen_at * 1e3,
            writing_ms=stored.pages_ms,
            bytes=stored.pages * PAGE + stored.image_bytes,
        )


@contextmanager
def written(
    pid: int,
    draft: Draft,
    store: Store,
    *,
    hold: Hold | None,
    ends: bool = True,
    tcp_close: bool = False,
    permits: Permits = ALL,
    timeout_ms: int = FREEZE_MS,
    listener: Listener,
) -> Iterator[Written]:
    """The tree under `pid` stands still, and all of it is written. On leaving it runs on, unless it has been ended.

    With `hold` the packets of its TCP connections are held back, until a restore of the images when it `ends`. Raises
    what `checkpoint` raises, but for the obstacles that are known before.
    """
    asleep = observed_sleeps(pid)
    frozen_at = time.monotonic()
    with frozen_tree(pid, asleep=asleep, timeout_ms=timeout_ms) as tree:
        listener(StateChanged("frozen", frozen_at))
        with (
            hold or nullcontext(),
            dumped(tree, tcp_close=tcp_close, permits=permits, hold=hold.add if hold else None) as dump,
            dump_pages(dump) as pages,
        ):
            whole = dump.for_images()
            if hold is not None and dump.outside and ends:
                whole = replace(whole, held=hold.session)
            for name in _left_outside(whole):
                listener(Note(f"{name} stays outside: a restore needs --inherit-fd 'fd[N]:{name}'"))
            stored = store(draft, whole, pages)
            if ends:
                draft.sync()
                _add_late_signals(draft, tree, whole)
            dump.demand_idle_rings()
            yield Written(tree, dump, pages, whole, stored, hold, frozen_at)


def _add_late_signals(draft: Draft, tree: FrozenTree, whole: Checkpoint) -> None:
    """Writing takes as long as there is memory, and what is sent meanwhile to a tree that ends here would be lost."""
    if (late := late_signals(tree, whole)).signals:
        before, after = to_images(whole), to_images(late.added_to(whole))
        draft.rewrite({name: data for name, data in after.items() if data != before[name]})


def _left_outside(checkpoint: Checkpoint) -> list[str]:
    return sorted({name_of(file, checkpoint) for file in checkpoint.files.values() if file.outside})


def new_hold() -> Hold:
    return Hold(f"{DUMPED}{os.urandom(8).hex()}")


def checkpoint(
    pid: int,
    directory: Path | str,
    *,
    leave_running: bool = False,
    tcp_close: bool = False,
    listener: Listener = ignore,
    leave_stopped: bool = False,
    keep_connections: bool = False,
    permits: Permits = ALL,
    timeout_ms: int = FREEZE_MS,
    last: Callable[[], object] = lambda: None,
    store: Store | None = None,
) -> CheckpointReport:
    """Freeze the tree under `pid`, write it to `directory`, and end it unless `leave_running`, or `leave_stopped` as
    by SIGSTOP. With `tcp_close` TCP connections to others are given up: a restore has them ended. With
    `keep_connections` the peers of its TCP connections are told nothing of its end, and the packets of these
    connections are held back until it is restored, which takes nf_tables. It is frozen within `timeout_ms`, or left
    alone. `last` is called when all is written and the tree stands still; what it raises is an error like any other.
    What the `permits` do not have is an obstacle. `store` writes images and pages, both into the folder without it.

    On any error the tree runs on as before and the folder is not left looking whole. Raises CannotBeDone with all
    obstacles, ImageError (a full disk), NoSuchProcess, PermissionDenied, TraceeError.
    """
    started = time.monotonic()
    leave_running |= leave_stopped
    permits = replace(permits, first=leave_running)
    examine_again(pid, tcp_close=tcp_close, permits=permits, listener=listener)
    with ExitStack() as over, ExitStack() as unfinished:
        # The disk has its time when the tree runs again, unless it is to end.
        draft = unfinished.enter_context(filled(Folder(directory), early=not leave_running))
        with written(
            pid,
            draft,
            store or storing.whole,
            hold=new_hold() if keep_connections else None,
            ends=not leave_running,
            tcp_close=tcp_close,
            permits=permits,
            timeout_ms=timeout_ms,
            listener=listener,
        ) as it:
            last()
            if leave_stopped:
                it.tree.stop()
            if not leave_running:
                unfinished.close()  # from here on the images stay, whatever becomes of this host
                over.enter_context(deaf())  # it ends here, and an interrupt would say that it runs on
                it.end()
        thawed = time.monotonic()
        unfinished.close()
        now = time.monotonic()
        listener(StepDone("checkpoint", now, now - started))
        return it.report(started, thawed)
