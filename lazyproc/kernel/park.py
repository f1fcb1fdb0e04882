"""Parked, a process stays where it is whatever becomes of its tracer.

ptrace is no freeze: a dead tracer's tracees run at once (tried), and any SIGCONT undoes a SIGSTOP. So each thread gets
an endless pause(2) to run, with all signals blocked: traced it does not run at all, without a tracer it sleeps, and
only SIGKILL ends it. Its own registers and mask are kept by whoever may let it go on (docs/adr/0009-parking.md). A
thread with seccomp filters, which might kill it for pause(2), gets a loop without any call: that costs a CPU, but only
while no tracer is there.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from lazyproc.errors import LazyprocError, NoSuchProcess, TraceeError
from lazyproc.facts import dataclass
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.padding import padding
from lazyproc.kernel.remote import STUB_ROOM
from lazyproc.kernel.settle import Stopped, settle_again
from lazyproc.kernel.tracee import Memory, Tracee
from lazyproc.model import Registers

STOP_MS = 2000
NEVER_BLOCKED = 1 << signal.SIGKILL - 1 | 1 << signal.SIGSTOP - 1


@dataclass(frozen=True, slots=True)
class ParkedThread:
    """Where a thread goes on when it is let go."""

    tid: int  # in our pid namespace
    registers: Registers
    blocked: int
    ended_by_stop: (
        Registers | None
    )  # in place of `registers` when a signal has come meanwhile: kernel/settle.py


@dataclass(frozen=True, slots=True)
class ParkedProcess:
    """One process of a parked tree. `started` (clock ticks since boot) tells it from a later one with its number."""

    pid: int
    started: int
    at: int  # address of the code that its threads run
    threads: tuple[ParkedThread, ...]


def place_for(
    pid: int,
    started: int,
    maps: Sequence[proc.MapsEntry],
    tracees: Sequence[Tracee],
    stopped: Sequence[Stopped],
    memory: Memory,
) -> ParkedProcess:
    """What parking would do to a frozen process; nothing is done yet. Raises TraceeError."""
    at = padding(
        maps,
        memory,
        len(arch.PARK),
        behind=STUB_ROOM,
        stale=arch.PARK.__eq__,
        ips=(each.state.registers.ip for each in stopped),
    )
    threads = tuple(
        ParkedThread(tracee.tid, each.state.registers, each.state.blocked, each.ended_by_stop)
        for tracee, each in zip(tracees, stopped, strict=True)
    )
    return ParkedProcess(pid, started, at, threads)


def park(process: ParkedProcess, tracees: Sequence[Tracee], filtered: Sequence[bool], memory: Memory) -> None:
    """Park a frozen process. `filtered`: whether each thread has seccomp filters.

    Registers before masks: between the two a dead tracer's thread pauses and still takes its signals.
    """
    memory.write(process.at, arch.PARK)
    for tracee, thread, is_filtered in zip(tracees, process.threads, filtered, strict=True):
        at = process.at + (arch.SPIN if is_filtered else 0)
        tracee.set_registers(arch.parked(thread.registers, at))
        tracee.set_blocked(arch.MASK64)


def unpark(process: ParkedProcess, tracees: Sequence[Tracee], memory: Memory) -> None:
    """The way back, by who has parked it and holds it still."""
    for tracee, thread in zip(tracees, process.threads, strict=True):
        _take_out(tracee, thread)
    memory.write(process.at, bytes(len(arch.PARK)))


def is_there(process: ParkedProcess) -> bool:
    """Whether the process still lives, and is not another one with its number."""
    return proc.lives(process.pid, process.started)


def looks_parked(pid: int, blocked: int) -> bool:
    """Whether a thread of that process with this mask is parked, by whomever: every signal is blocked, and the code is
    there. Nothing is stopped to see it. Raises NoSuchProcess.
    """
    if blocked | NEVER_BLOCKED != arch.MASK64:
        return False
    with ptrace.memory(pid) as memory:
        for entry in proc.maps(proc.read(pid, "maps")):
            if "x" in entry.perms:
                with suppress(TraceeError):  # [vsyscall], or behind the end of a file
                    if memory.read(entry.end - STUB_ROOM - len(arch.PARK), len(arch.PARK)) == arch.PARK:
                        return True
    return False


def let_run(process: ParkedProcess) -> None:
    """A process that was parked by somebody who is gone runs on where it was. It may run already.

    Raises NoSuchProcess when it has ended, PermissionDenied when somebody traces it, TraceeError.
    """
    with _stopped(process) as tracees:
        _put_back(process, tracees)


def stands(process: ParkedProcess) -> bool:
    """Whether all of it is parked, which it is not when its tracer died while it was being parked. Raises as `let_run`
    does.
    """
    with _stopped(process) as tracees:
        return all(_is_parked(process, tracee) for tracee in tracees)


@contextmanager
def _stopped(process: ParkedProcess) -> Iterator[list[Tracee]]:
    if not is_there(process):
        raise NoSuchProcess("has ended meanwhile", where=f"pid {process.pid}")
    tracees: list[Tracee] = []
    try:
        for thread in process.threads:
            tracee = Tracee(thread.tid)
            tracee.seize()
            tracees.append(tracee)
            tracee.interrupt()
            tracee.wait_stop(STOP_MS)
        yield tracees
    finally:
        for tracee in reversed(tracees):
            with suppress(LazyprocError):
                tracee.detach()


def _is_parked(process: ParkedProcess, tracee: Tracee) -> bool:
    return process.at <= tracee.registers().ip < process.at + len(arch.PARK)


def _put_back(process: ParkedProcess, tracees: Sequence[Tracee]) -> None:
    """Those that stand in the parking code. When its tracer died while it was being parked, the others run already:
    their registers are their own, and the code stays, since a signal handler may have to return to it.
    """
    parked = [
        (tracee, thread)
        for tracee, thread in zip(tracees, process.threads, strict=True)
        if _is_parked(process, tracee)
    ]
    with ptrace.memory(process.pid) as memory:
        for tracee, thread in parked:
            _take_out(tracee, thread)
            status = proc.status(proc.read(process.pid, f"task/{thread.tid}/status"))
            settle_again(tracee, thread.ended_by_stop, status, thread.blocked)
        if len(parked) == len(tracees):
            memory.write(process.at, bytes(len(arch.PARK)))


def _take_out(tracee: Tracee, thread: ParkedThread) -> None:
    """Mask before registers: nobody runs on with all signals blocked."""
    tracee.set_blocked(thread.blocked)
    tracee.set_registers(thread.registers)
