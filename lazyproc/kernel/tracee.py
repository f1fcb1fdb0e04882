"""One stopped thread: seize, stop, registers, masks, memory. Every call comes from the thread that seized.

ptrace(2) is per tracer *thread*, so a whole dump or restore runs in one.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from lazyproc.errors import NoSuchProcess, PermissionDenied, TraceeError
from lazyproc.facts import dataclass
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc
from lazyproc.kernel._core import ffi, lib
from lazyproc.kernel.sys import check, cpuid
from lazyproc.model import Registers, Rseq, SeccompFilter

# include/uapi/linux/ptrace.h
(
    PTRACE_GETREGS,
    PTRACE_SETREGS,
    PTRACE_CONT,
    PTRACE_DETACH,
    PTRACE_SETOPTIONS,
    PTRACE_GETEVENTMSG,
    PTRACE_SETREGSET,
    PTRACE_SEIZE,
    PTRACE_INTERRUPT,
    PTRACE_PEEKSIGINFO,
    PTRACE_SETSIGMASK,
    PTRACE_SECCOMP_GET_FILTER,
    PTRACE_SECCOMP_GET_METADATA,
    PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG,
) = (12, 13, 7, 17, 0x4200, 0x4201, 0x4205, 0x4206, 0x4207, 0x4209, 0x420B, 0x420C, 0x420D, 0x4211)
PTRACE_O_TRACESYSGOOD = 1
PTRACE_O_EXITKILL = 1 << 20
PTRACE_O_SUSPEND_SECCOMP = 1 << 21
PTRACE_EVENT_STOP = 128
PTRACE_PEEKSIGINFO_SHARED = 1
NT_X86_XSTATE = 0x202
SIGINFO = 128
XSAVE_MAX = 16384
WALL = 0x40000000  # __WALL
# Signals that another one takes away while they are pending (prepare_signal, kernel/signal.c).
CLEARED = sum(
    1 << (sig - 1) for sig in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT)
)
_NUMBER = struct.Struct("<i")  # si_signo begins a siginfo
GONE_PAUSE_S = 0.0002
# EPERM also while exec in another thread takes this one's number over (fs/exec.c, de_thread).
SEIZE_TRIES, SEIZE_PAUSE_S = 20, 0.0005
UNINTERRUPTIBLE = "it is in uninterruptible sleep (I/O, a vfork child, a page fault that nobody serves)"


@dataclass(frozen=True, slots=True)
class State:
    """What ptrace(2) shows of a stopped thread, and puts back."""

    registers: Registers
    xsave: bytes  # NT_X86_XSTATE; its size is the kernel's answer (AMX: 11008 bytes), not a constant
    blocked: int  # bit n-1 is signal n
    rseq: Rseq | None
    robust_list: int
    robust_list_len: int


class Tracee:
    """A seized thread. Methods raise NoSuchProcess when it is gone, TraceeError when the kernel refuses."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.stop_signal = 0  # the group-stop signal when it was found stopped (state T)

    def _ptrace(self, request: int, addr: int = 0, data: int = 0) -> int:
        result = int(lib.lp_ptrace(request, self.tid, addr, data))
        if result == -errno.ESRCH:
            raise NoSuchProcess("the thread is gone", where=f"thread {self.tid}", remedy="check the pid")
        if result < 0:
            raise TraceeError(
                f"ptrace request {request:#x} failed: {os.strerror(-result)}",
                where=f"thread {self.tid}",
                remedy="see ptrace(2)",
            )
        return result

    # --- stopping and letting go -------------------------------------------------------------------------------

    def seize(self, options: int = PTRACE_O_TRACESYSGOOD) -> None:
        """PTRACE_SEIZE; PermissionDenied names who traces it already or what is missing."""
        for attempt in range(SEIZE_TRIES):
            result = int(lib.lp_ptrace(PTRACE_SEIZE, self.tid, 0, options))
            if result == 0:
                return
            if result != -errno.EPERM:
                break
            time.sleep(SEIZE_PAUSE_S * bool(attempt))
        raise self._not_seized(-result)

    def _not_seized(self, error: int) -> NoSuchProcess | PermissionDenied | TraceeError:
        where = f"thread {self.tid}"
        if error == errno.ESRCH:
            return NoSuchProcess("no such thread", where=where, remedy="check the pid")
        if error != errno.EPERM:
            return TraceeError(f"cannot be traced: {os.strerror(error)}", where=where, remedy="see ptrace(2)")
        try:
            status = proc.status(proc.read(self.tid, "status"))
        except NoSuchProcess as gone:
            return gone
        if (
            status.state in "ZX"
        ):  # the kernel's answer for these is EPERM, too (kernel/ptrace.c, ptrace_attach)
            return NoSuchProcess("has ended", where=where, remedy="check the pid")
        if status.tracer_pid:
            remedy = f"detach that one first: see ps {status.tracer_pid}"
            return PermissionDenied(
                f"is traced by pid {status.tracer_pid} already", where=where, remedy=remedy
            )
        if status.kernel_thread:
            return PermissionDenied("is a kernel thread", where=where, remedy="give the pid of a program")
        return PermissionDenied(
            "may not be traced", where=where, remedy="run as root, or as its owner with CAP_SYS_PTRACE"
        )

    def interrupt(self) -> None:
        self._ptrace(PTRACE_INTERRUPT)

    def wait_stop(self, timeout_ms: int) -> None:
        """Wait until the thread is in an event stop. TraceeError when it does not stop in time (D state)."""
        status = ffi.new("int *")
        while True:
            got = int(lib.lp_wait(self.tid, status, timeout_ms))
            if got == 0:
                raise TraceeError(
                    f"does not stop: {UNINTERRUPTIBLE}",
                    where=f"thread {self.tid}",
                    remedy="try again when it is over",
                )
            if got < 0 or not os.WIFSTOPPED(status[0]):
                raise NoSuchProcess(
                    "ended while it was being stopped", where=f"thread {self.tid}", remedy="check the pid"
                )
            if status[0] >> 16 == PTRACE_EVENT_STOP:
                self.stop_signal = _group_stop(os.WSTOPSIG(status[0]))
                return
            # A signal was on its way. Its stop has taken a pending interrupt away (ptrace_stop, kernel/signal.c): one
            # that is asked for before the signal is delivered comes before the next signal.
            self.interrupt()
            self.cont(os.WSTOPSIG(status[0]))

    def is_stopped(self) -> bool:
        """Whether it stands still and is our tracee; every other request would raise NoSuchProcess."""
        message = ffi.new("unsigned long *")
        return int(lib.lp_ptrace(PTRACE_GETEVENTMSG, self.tid, 0, _address(message))) == 0

    def cont(self, sig: int = 0) -> None:
        self._ptrace(PTRACE_CONT, 0, sig)

    def set_options(self, options: int) -> None:
        self._ptrace(PTRACE_SETOPTIONS, 0, options)

    def detach(self) -> None:
        """Let the thread run (or stay in its group stop)."""
        self._ptrace(PTRACE_DETACH)

    # --- registers and masks -----------------------------------------------------------------------------------

    def registers(self) -> Registers:
        raw = bytearray(arch.REGISTERS.size)
        self._ptrace(PTRACE_GETREGS, 0, _address(raw))
        return arch.unpack_registers(bytes(raw))

    def set_registers(self, registers: Registers) -> None:
        raw = arch.pack_registers(registers)
        self._ptrace(PTRACE_SETREGS, 0, _address(raw))

    def set_blocked(self, mask: int) -> None:
        value = ffi.new("uint64_t *", mask)
        self._ptrace(PTRACE_SETSIGMASK, 8, _address(value))

    def pending(self, bits: int, *, shared: bool) -> tuple[bytes, ...]:
        """The pending signals of the thread, or of its process, oldest first; siginfo of 128 bytes each. `bits` are
        those of proc.Status: one of them that is not in the queue had no room there (RLIMIT_SIGPENDING), and comes with
        what the kernel makes up for it.
        """
        queued = self.queued(shared=shared)
        left = bits & ~CLEARED
        for info in queued:
            left &= ~(1 << (_NUMBER.unpack_from(info)[0] - 1))
        return queued + tuple(
            _NUMBER.pack(sig).ljust(SIGINFO, b"\0") for sig in range(1, 65) if left >> (sig - 1) & 1
        )

    def queued(self, *, shared: bool) -> tuple[bytes, ...]:
        """Of the pending signals those that are in a queue."""
        found: list[bytes] = []
        batch = 32
        buffer = bytearray(SIGINFO * batch)
        while True:
            flags = PTRACE_PEEKSIGINFO_SHARED if shared else 0
            args = struct.pack("<QIi", len(found), flags, batch)
            got = self._ptrace(PTRACE_PEEKSIGINFO, _address(args), _address(buffer))
            found += [bytes(buffer[SIGINFO * i : SIGINFO * (i + 1)]) for i in range(got)]
            if got < batch:
                return tuple(found)

    def dispatches_calls(self) -> bool:
        """Whether it may get its own system calls as SIGSYS (prctl(2), PR_SET_SYSCALL_USER_DISPATCH)."""
        config = ffi.new("uint64_t[4]")  # mode, selector, offset, length
        self._ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, ffi.sizeof(config), _address(config))
        return bool(config[0])

    def seccomp_filters(self, count_limit: int = 32768) -> tuple[SeccompFilter, ...]:
        """The classic BPF filters, oldest first. The kernel numbers them from the oldest."""
        found: list[SeccompFilter] = []
        for index in range(count_limit):
            length = int(lib.lp_ptrace(PTRACE_SECCOMP_GET_FILTER, self.tid, index, 0))
            if length == -errno.ENOENT:
                break
            check(length)
            program = bytearray(8 * length)
            self._ptrace(PTRACE_SECCOMP_GET_FILTER, index, _address(program))
            metadata = bytearray(struct.pack("<QQ", index, 0))
            self._ptrace(PTRACE_SECCOMP_GET_METADATA, len(metadata), _address(metadata))
            found.append(SeccompFilter(bytes(program), struct.unpack("<QQ", metadata)[1]))
        return tuple(found)


@functools.cache
def xsave_size() -> int:
    """Bytes of the whole NT_X86_XSTATE area here: what XCR0 enables, in the standard format."""
    return cpuid(0xD, 0)[1]


def wait_gone(tids: Iterable[int]) -> None:
    """Take what killed tracees leave, in whatever order they end.

    A leader ends after its tracer has taken all its threads (ptrace(2)). In the first process of a pid namespace the
    thread that ends last, any of them, waits until everybody else there is taken (zap_pid_ns_processes).
    """
    left = set(tids)
    while left := {tid for tid in left if not _is_gone(tid)}:
        time.sleep(GONE_PAUSE_S)


def _is_gone(tid: int) -> bool:
    try:
        got, status = os.waitpid(tid, WALL | os.WNOHANG)
    except ChildProcessError:
        return True
    return got == tid and not os.WIFSTOPPED(status)


def states(tracees: Sequence[Tracee]) -> list[State]:
    """The state of several stopped threads, in their order; one call, since this is done while they stand still."""
    threads = ffi.new("struct lp_thread[]", len(tracees))
    for thread, tracee in zip(threads, tracees, strict=True):
        thread.tid = tracee.tid
    xsave = bytearray(XSAVE_MAX * len(tracees))
    if lib.lp_look(threads, len(tracees), ffi.from_buffer(xsave), XSAVE_MAX) < 0:
        raise next(_not_seen(thread.tid, -thread.error) for thread in threads if thread.error < 0)
    areas = memoryview(xsave)
    return [
        _state(thread, bytes(areas[start : start + thread.xsave_size]))
        for thread, start in zip(threads, range(0, len(xsave), XSAVE_MAX), strict=True)
    ]


def dress(threads: Sequence[tuple[Tracee, Registers, bytes, int]]) -> None:
    """Registers, xsave area and blocked signals that these stopped threads go on with.

    An area that ends early, of a processor with less or of CRIU's, is filled up: the kernel takes no shorter. Raises
    NoSuchProcess, TraceeError.
    """
    rows, at = ffi.new("struct lp_dress[]", len(threads)), ffi.new("size_t *")
    areas = [xsave.ljust(xsave_size(), b"\0") for _, _, xsave, _ in threads]
    for row, area, (tracee, registers, _, blocked) in zip(rows, areas, threads, strict=True):
        row.tid, row.registers, row.blocked = tracee.tid, registers, blocked
        row.xsave, row.xsave_size = _address(area), len(area)
    error = -int(lib.lp_dress(rows, len(threads), at))
    if error == errno.ESRCH:
        raise NoSuchProcess("the thread is gone", where=f"thread {rows[at[0]].tid}", remedy="check the pid")
    if error:
        raise TraceeError(
            f"its state cannot be set: {os.strerror(error)}",
            where=f"thread {rows[at[0]].tid}",
            remedy="see ptrace(2)",
        )


def _state(thread: ffi.CData, xsave: bytes) -> State:
    rseq = Rseq(thread.rseq_addr, thread.rseq_size, thread.rseq_signature) if thread.rseq_addr else None
    registers = Registers(*thread.registers)
    return State(registers, xsave, thread.blocked, rseq, thread.robust_list, thread.robust_list_len)


def _not_seen(tid: int, error: int) -> NoSuchProcess | TraceeError:
    if error == errno.ESRCH:
        return NoSuchProcess("the thread is gone", where=f"thread {tid}", remedy="check the pid")
    return TraceeError(
        f"its state cannot be read: {os.strerror(error)}", where=f"thread {tid}", remedy="see ptrace(2)"
    )


def _group_stop(sig: int) -> int:
    """PTRACE_INTERRUPT alone reports SIGTRAP; a thread found in a group stop reports the stopping signal."""
    return 0 if sig == signal.SIGTRAP else sig


def _address(buffer: object) -> int:
    """Address of a bytes-like object or a cffi array; the caller keeps it alive during the call."""
    if isinstance(buffer, (bytes, bytearray)):
        buffer = ffi.from_buffer(buffer)
    return int(ffi.cast("uintptr_t", buffer))


NO_OFFSET = "it is in the kernel's half"  # [vsyscall], or where a pointer that is none leads to


class Memory:
    """/proc/PID/mem: reads and writes past the protection bits (FOLL_FORCE), as ptrace(2) would.

    Writing to a read-only private mapping copies the page, as a debugger's breakpoint does.
    """

    def __init__(self, fd: int, pid: int) -> None:
        self._fd = fd
        self._pid = pid

    def read(self, addr: int, length: int) -> bytes:
        try:
            data = os.pread(self._fd, length, addr)
        except OverflowError:
            raise self._failed("read", addr, length, NO_OFFSET) from None
        except OSError as error:
            raise self._failed("read", addr, length, error.strerror or "") from error
        if len(data) != length:
            raise self._failed("read", addr, length, f"got {len(data)} bytes")
        return data

    def write(self, addr: int, data: bytes) -> None:
        try:
            written = os.pwrite(self._fd, data, addr)
        except OverflowError:
            raise self._failed("write", addr, len(data), NO_OFFSET) from None
        except OSError as error:
            raise self._failed("write", addr, len(data), error.strerror or "") from error
        if written != len(data):
            raise self._failed("write", addr, len(data), f"wrote {written} bytes")

    def demand_there(self) -> None:
        """Raises NoSuchProcess when the process has no address space any more: then nothing is read, wherever
        (fs/proc/base.c, mem_rw).
        """
        try:
            ended = not os.pread(self._fd, 1, 0)
        except OSError:  # it has one, and nothing there
            ended = False
        if ended:
            raise NoSuchProcess("has ended", where=f"pid {self._pid}", remedy="see who has killed it")

    def _failed(self, verb: str, addr: int, length: int, why: str) -> TraceeError:
        return TraceeError(
            f"could not {verb} {length} bytes at {addr:#x}: {why}",
            where=f"pid {self._pid}",
            remedy="look whether the mapping is still there (/proc/PID/maps)",
        )


@contextmanager
def memory(pid: int) -> Iterator[Memory]:
    """The memory of a process that we may ptrace."""
    try:
        fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):  # the latter of a zombie
        raise NoSuchProcess("no such process", where=f"pid {pid}", remedy="check the pid") from None
    except PermissionError:
        raise PermissionDenied(
            "its memory may not be opened", where=f"pid {pid}", remedy="run as root or with CAP_SYS_PTRACE"
        ) from None
    try:
        yield Memory(fd, pid)
    finally:
        os.close(fd)
