"""A process tree into a folder of CRIU-format images."""

from __future__ import annotations

import builtins
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

from lazyproc.dump.before import observed_sleeps
from lazyproc.dump.explain import explain
from lazyproc.dump.freeze import FREEZE_MS, FrozenTree, frozen_tree
from lazyproc.dump.gather import Dump, dumped
from lazyproc.dump.permits import ALL, Permits
from lazyproc.dump.source import dump_pages
from lazyproc.dump.tcp import silence
from lazyproc.errors import CannotBeDone
from lazyproc.events import Listener, Note, StateChanged, StepDone
from lazyproc.facts import dataclass, replace
from lazyproc.images.convert import to_images
from lazyproc.images.draft import filled
from lazyproc.images.files import Folder
from lazyproc.images.stats import dump_stats
from lazyproc.kernel.deaf import deaf
from lazyproc.kernel.netfilter import DUMPED, Hold
from lazyproc.model import PAGE, Checkpoint
from lazyproc.outside import name_of
from lazyproc.pages.images import write_pages


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


def checkpoint(
    pid: int,
    directory: Path,
    *,
    leave_running: bool,
    tcp_close: bool,
    listener: Listener,
    leave_stopped: bool = False,
    keep_connections: bool = False,
    permits: Permits = ALL,
    timeout_ms: int = FREEZE_MS,
    last: Callable[[], object] = lambda: None,
) -> CheckpointReport:
    """Freeze the tree under `pid`, write it to `directory`, and end it unless `leave_running`, or `leave_stopped` as
    by SIGSTOP. With `keep_connections` the peers of its TCP connections are told nothing of its end, and the packets of
    these connections are held back until it is restored, which takes nf_tables. It is frozen within `timeout_ms`, or
    left alone. `last` is called when all is written and the tree stands still; what it raises is an error like any
    other.
    What the `permits` do not have is an obstacle.

    On any error the tree runs on as before and the folder is not left looking whole. Raises CannotBeDone with all
    obstacles, ImageError (a full disk), NoSuchProcess, PermissionDenied, TraceeError.
    """
    started = time.monotonic()
    leave_running |= leave_stopped
    obstacles = explain(pid, tcp_close=tcp_close, permits=permits, listener=listener)
    if obstacles:
        raise CannotBeDone(obstacles)
    folder = Folder(directory)
    with ExitStack() as unfinished:
        # The disk has its time when the tree runs again, unless it is to end.
        draft = unfinished.enter_context(filled(folder, early=not leave_running))
        asleep = observed_sleeps(pid)
        frozen_at = time.monotonic()
        with frozen_tree(pid, asleep=asleep, timeout_ms=timeout_ms) as tree:
            listener(StateChanged("frozen", frozen_at))
            hold = Hold(f"{DUMPED}{os.urandom(8).hex()}") if keep_connections else None
            with (
                hold or nullcontext(),
                dumped(tree, tcp_close=tcp_close, permits=permits, hold=hold.add if hold else None) as dump,
                dump_pages(dump) as pages,
            ):
                whole = dump.for_images()
                if hold is not None and dump.outside and not leave_running:
                    whole = replace(whole, held=hold.session)
                for name in _left_outside(whole):
                    listener(Note(f"{name} stays outside: a restore needs --inherit-fd 'fd[N]:{name}'"))
                images = to_images(whole)
                writing_at = time.monotonic()
                written = write_pages(draft, whole, pages)
                writing_ms = (time.monotonic() - writing_at) * 1e3
                draft.write(images)
                if not leave_running:
                    draft.sync()
                dump.demand_idle_rings()
                last()
                if leave_stopped:
                    tree.stop()
                if not leave_running:
                    unfinished.close()  # from here on the images stay, whatever becomes of this host
                    with deaf():
                        _end(tree, dump, hold)
        thawed = time.monotonic()
    now = time.monotonic()
    listener(StepDone("checkpoint", now, now - started))
    return CheckpointReport(
        root_pid=pid,
        root_vpid=whole.root.vpid,
        tasks=len(whole.tasks),
        threads=sum(len(task.threads) for task in whole.tasks),
        pages_total=written,
        frozen_ms=(thawed - frozen_at) * 1e3,
        total_ms=(now - started) * 1e3,
        stopping_ms=tree.frozen_at_ns / 1e6 - frozen_at * 1e3,
        writing_ms=writing_ms,
        bytes=written * PAGE + sum(map(len, images.values())),
    )


def _left_outside(checkpoint: Checkpoint) -> list[str]:
    return sorted({name_of(file, checkpoint) for file in checkpoint.files.values() if file.outside})


def _end(tree: FrozenTree, dump: Dump, hold: Hold | None) -> None:
    """With `hold` the peers of its connections hear nothing of it."""
    if hold is not None:
        hold.keep_only(dump.outside)
        silence(dump.connections)
    tree.kill()
    dump.remove_segments()
