"""A QEMU at the source after its guest was stopped: a store of pages, and how it is ended or goes on.

QMP stops the guest and lets it go on. QEMU itself is not stopped: it needs nobody to keep its guest still, and does not
write to the RAM of one that stands (softmmu/cpus.c do_vm_stop drains the disks, net/net.c takes no packet then).
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lazyproc.errors import ConnectionLost, LazyprocError, NoSuchProcess
from lazyproc.facts import dataclass
from lazyproc.kernel import proc
from lazyproc.kernel.ready import readable
from lazyproc.kernel.sys import pidfd_open
from lazyproc.migrate.guest_extents import extents_of
from lazyproc.migrate.holding import GONE_S
from lazyproc.model import Extent, MemoryObject
from lazyproc.pages.frozen import FrozenPages
from lazyproc.qemu.guest import Guest, process_behind
from lazyproc.qemu.qmp import FLUSH_S, PATIENCE_S, Qmp


@dataclass(frozen=True, slots=True)
class HeldGuest:
    guest: Guest

    @property
    def root_pid(self) -> int:
        return self.guest.pid

    def extents(self) -> dict[MemoryObject, tuple[Extent, ...]]:
        """Every page that QEMU has for its guest; all others are zero."""
        return extents_of(self.guest)

    def open(self) -> FrozenPages:
        self.demand_there()
        return FrozenPages(self.guest.places(), {})

    @contextmanager
    def monitor(self, timeout: float = PATIENCE_S) -> Iterator[Qmp]:
        """Of this very QEMU: one that was started with the same -qmp since has taken the path over. Raises
        ConnectionLost, LazyprocError, NoSuchProcess, UsageError.
        """
        self.demand_there()
        with Qmp(self.guest.qmp, timeout=timeout) as qmp:
            if (pid := process_behind(qmp)) != self.guest.pid:
                raise LazyprocError(
                    f"the monitor of pid {self.guest.pid} can no longer be reached: pid {pid} has its path by now",
                    where=self.guest.qmp,
                    remedy="give each QEMU a path of its own (-qmp)",
                )
            yield qmp

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else of ours has it stand meanwhile, by another monitor: he would take it for one that was paused.
        Whoever is killed lets go. Raises LazyprocError, NoSuchProcess.
        """
        try:
            fd = os.open(f"/proc/{self.guest.pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NoSuchProcess("QEMU has ended", where=f"pid {self.guest.pid}") from None
        try:
            self._take(fd)
            yield
        finally:
            os.close(fd)

    def _take(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LazyprocError(
                "another lazyproc saves or moves the guest",
                where=f"QEMU of pid {self.guest.pid}",
                remedy="wait until that is over, and try again",
            ) from None

    def stands(self) -> bool:
        with self.monitor() as qmp:
            return qmp.execute("query-status")["running"] is False

    def ended(self) -> int | None:
        return None if proc.lives(self.guest.pid, self.guest.started) else self.guest.pid

    def demand_there(self) -> None:
        if self.ended() is not None:
            raise NoSuchProcess("QEMU has ended", where=f"pid {self.guest.pid}")

    def let_run(self) -> None:
        """As it was: a guest that was paused stays so. Raises ConnectionLost, Refusal, TimeoutError, and what `monitor`
        does.
        """
        self.demand_there()
        if self.guest.running:
            with self.monitor(FLUSH_S) as qmp:
                qmp.execute("cont", timeout=FLUSH_S)

    def end(self) -> None:
        """QEMU quits, or is killed when it does not: nothing that it has is written any more."""
        try:
            pidfd = pidfd_open(self.guest.pid)
        except ProcessLookupError:
            return
        try:
            if self.ended() is not None:
                return
            quits = False
            with suppress(LazyprocError, TimeoutError), self.monitor() as qmp:
                with suppress(ConnectionLost):  # it may have ended before we hear that it will
                    qmp.execute("quit")
                quits = True
            if not (quits and readable([pidfd], GONE_S)):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                readable([pidfd], GONE_S)
        finally:
            os.close(pidfd)
