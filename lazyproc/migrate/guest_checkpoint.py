"""A guest into a folder of images: stopped and let go by its monitor, its RAM read where it lies."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from lazyproc.events import Listener, StateChanged, StepDone, ignore
from lazyproc.facts import dataclass
from lazyproc.images.draft import filled
from lazyproc.images.files import Folder
from lazyproc.kernel.deaf import deaf
from lazyproc.migrate.guest_look import looked_at
from lazyproc.migrate.guest_source import demand_stopped, demand_unchanged, let_go_on
from lazyproc.migrate.guest_watch import watched
from lazyproc.migrate.held_guest import HeldGuest
from lazyproc.model import PAGE
from lazyproc.qemu import devices, saved
from lazyproc.qemu.qmp import Qmp


@dataclass(frozen=True, slots=True)
class GuestCheckpointReport:
    """What was written; times in ms. `frozen_ms`: how long the guest stood still, or until all was written."""

    pid: int
    pages_total: int
    frozen_ms: float
    total_ms: float
    bytes: int


def checkpoint_guest(
    monitor: str, directory: Path | str, *, leave_running: bool = False, listener: Listener = ignore
) -> GuestCheckpointReport:
    """Write the guest of the QEMU whose QMP monitor is the unix socket `monitor` to `directory`; QEMU quits then,
    unless the guest is to go on. A guest that was paused stays so.

    On any error it goes on as before and the folder is not left looking whole. Raises CannotBeDone with all obstacles,
    ImageError (a full disk), Refusal.
    """
    started = time.monotonic()
    with ExitStack() as last, ExitStack() as stack:
        qmp = stack.enter_context(Qmp(monitor))
        guest = looked_at(qmp)
        held = HeldGuest(guest)
        with ExitStack() as unfinished:
            draft = unfinished.enter_context(filled(Folder(directory), early=not leave_running))
            frozen_at = time.monotonic()
            listener(StateChanged("frozen", frozen_at))
            with watched(qmp, held) as over, held.open() as pages:
                state = devices.saved(qmp, guest.machine, ran=guest.running)
                written = saved.write(draft, guest, state, held.extents(), pages)
                if not leave_running:
                    draft.sync()
                demand_unchanged(qmp, guest)
                demand_stopped(qmp)
                if leave_running:
                    let_go_on(qmp, held)
                else:
                    last.enter_context(deaf())  # it is saved, and nobody lets it go on here
                over.set()
            frozen_ms = (time.monotonic() - frozen_at) * 1e3
        stack.close()
        if not leave_running:
            held.end()
    now = time.monotonic()
    listener(StepDone("checkpoint", now, now - started))
    total_ms, size = (now - started) * 1e3, written * PAGE + len(state)
    return GuestCheckpointReport(guest.pid, written, frozen_ms, total_ms, size)
