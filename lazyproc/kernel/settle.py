"""What a stop has interrupted in a thread, and how that goes on: here when it is let go, or in a copy of it.

A freeze should not be seen. Three things would show it: a critical section of rseq(2) that is not aborted, an
epoll_wait(2) or another wait that ends with EINTR, and, in a copy, a sleep that starts anew
(docs/adr/0003-sleep-restarts.md).
"""

from __future__ import annotations

import signal
import struct
from collections.abc import Sequence

from lazyproc.facts import dataclass, replace
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc, sleeps
from lazyproc.kernel.tracee import Memory, State, Tracee
from lazyproc.model import Registers, Restart, Rseq, SigAction

RSEQ_CS_OFFSET = 8  # struct rseq: cpu_id_start, cpu_id, rseq_cs
RSEQ_CS = struct.Struct("<IIQQQ")  # version, flags, start_ip, post_commit_offset, abort_ip
SA_RESTART = 0x10000000
_NUMBER = struct.Struct("<i")  # si_signo begins a siginfo
MILLISECOND_NS = 10**6


def _mask(*signals: int) -> int:
    return sum(1 << (sig - 1) for sig in signals)


IGNORED_BY_DEFAULT = _mask(signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH)


@dataclass(frozen=True, slots=True)
class Stopped:
    """A stopped thread, fit for remote calls. `status` is of the stop, before anything was done to the thread."""

    state: State
    status: proc.Status
    restart: Restart | None  # a sleep, with what is left of it
    ended_by_stop: Registers | None  # with EINTR, as the stop has left them


def settle(
    tracee: Tracee,
    state: State,
    status: proc.Status,
    memory: Memory,
    before: sleeps.SleepBefore | None,
    frozen_at_ns: int,
) -> Stopped:
    """Make a thread that was just stopped fit for remote calls; `before` and `frozen_at_ns` as in kernel/sleeps.py.

    A thread inside an rseq critical section goes to its abort address now: the kernel forgets the section at the
    first remote call, and the abort would be lost with the registers put back (tried: silent corruption).
    A call that the stop ended with EINTR is made again, an epoll_wait with the time that is left.
    """
    registers = _aborted(state.registers, state.rseq, memory) if state.rseq else state.registers
    restart, interrupted = None, None
    if arch.restart_code(registers) == arch.ERESTART_RESTARTBLOCK:
        restart = sleeps.remaining(before, registers, status.voluntary_switches, frozen_at_ns, memory.read)
    elif arch.ended_by_stop(registers) and not _waiting(tracee, status, state.blocked):
        left = sleeps.remaining(before, registers, status.voluntary_switches, frozen_at_ns, memory.read)
        interrupted, registers = registers, _again(registers, left)
    if registers != state.registers:
        tracee.set_registers(registers)
        state = replace(state, registers=registers)
    return Stopped(state, status, restart, interrupted)


def _aborted(registers: Registers, rseq: Rseq, memory: Memory) -> Registers:
    (pointer,) = struct.unpack("<Q", memory.read(rseq.addr + RSEQ_CS_OFFSET, 8))
    if not pointer:
        return registers
    _, _, start, length, abort = RSEQ_CS.unpack(memory.read(pointer, RSEQ_CS.size))
    inside = (registers.ip - start) & arch.MASK64 < length
    return registers._replace(ip=abort) if inside else registers


def _again(registers: Registers, left: Restart | None) -> Registers:
    again = arch.rewind(registers)
    if left is None:
        return again
    return again._replace(r10=-(-left.remaining_ns // MILLISECOND_NS))


def _waiting(tracee: Tracee, status: proc.Status, blocked: int) -> int:
    """The signals, as a mask, that are pending now and will interrupt the thread when it runs: those neither blocked
    nor ignored. `status` may be older: a frozen process cannot change what it ignores.
    """
    own = tracee.pending(status.sig_pending, shared=False)
    return _interrupting((*own, *tracee.pending(status.shared_pending, shared=True)), status, blocked)


def _interrupting(queued: Sequence[bytes], status: proc.Status, blocked: int) -> int:
    """Of the queued signals, as a mask, those that are neither blocked nor ignored."""
    if not queued:
        return 0
    ignored = status.sig_ignored | (IGNORED_BY_DEFAULT & ~status.sig_caught)
    return _mask(*{_NUMBER.unpack_from(info)[0] for info in queued}) & ~blocked & ~ignored


def settle_again(tracee: Tracee, ended_by_stop: Registers | None, status: proc.Status, blocked: int) -> None:
    """Before the thread is let go: a signal that came during the freeze ends its call with EINTR after all.

    Else its handler would run before a call that then waits for ever; programs rely on it to notice a flag.
    """
    if ended_by_stop is not None and _waiting(tracee, status, blocked):
        tracee.set_registers(ended_by_stop)


def resumed(
    stopped: Stopped, queued: Sequence[bytes], sigactions: Sequence[SigAction], memory: Memory
) -> tuple[Registers, Restart | None]:
    """How a copy of the thread runs on: its system call made again, or ended by a signal. `queued` are the signals that
    are pending, of its own and of its process.

    The copy gets its pending signals before it runs, so what the kernel would decide at their delivery
    (arch/x86/kernel/signal.c, handle_signal) is decided here.
    """
    registers = stopped.state.registers
    code = arch.restart_code(registers)
    if not code and stopped.ended_by_stop is None:
        return registers, None
    waiting = _interrupting(queued, stopped.status, stopped.state.blocked)
    if stopped.ended_by_stop is not None:
        return stopped.ended_by_stop if waiting else registers, None
    handlers = [action for action in sigactions if waiting >> (action.signal - 1) & 1]
    if handlers and _ends(code, handlers[0].flags):
        return registers._replace(ax=arch.MASK64 - arch.EINTR + 1, orig_ax=arch.MASK64), None
    return arch.rewind(registers, sleeps.interrupted_number(registers, memory.read)), stopped.restart


def _ends(code: int, handler_flags: int) -> bool:
    """Whether a handler ends the system call with EINTR."""
    if code == arch.ERESTARTSYS:
        return not handler_flags & SA_RESTART
    return code in (arch.ERESTARTNOHAND, arch.ERESTART_RESTARTBLOCK)
