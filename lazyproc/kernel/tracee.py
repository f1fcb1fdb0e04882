"""One stopped thread: seize, stop, registers, masks, memory. Every call comes from the thread that seized.

ptrace(2) is per tracer *thread*, so a whole dump or restore runs in one.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from lazyproc.errors import NoSuchProcess, PermissionDenied, TraceeError
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel._core import ffi, lib
from lazyproc.kernel.sys import check
from lazyproc.model import Registers, Rseq, SeccompFilter

# include/uapi/linux/ptrace.h
(
    PTRACE_GETREGS,
    PTRACE_SETREGS,
    PTRACE_CONT,
    PTRACE_DETACH,
    PTRACE_SETOPTIONS,
    PTRACE_GETREGSET,
    PTRACE_SETREGSET,
    PTRACE_SEIZE,
    PTRACE_INTERRUPT,
    PTRACE_PEEKSIGINFO,
    PTRACE_GETSIGMASK,
    PTRACE_SETSIGMASK,
    PTRACE_SECCOMP_GET_FILTER,
    PTRACE_SECCOMP_GET_METADATA,
    PTRACE_GET_RSEQ_CONFIGURATION,
) = (12, 13, 7, 17, 0x4200, 0x4204, 0x4205, 0x4206, 0x4207, 0x4209, 0x420A, 0x420B, 0x420C, 0x420D, 0x420F)
PTRACE_O_TRACESYSGOOD = 1
PTRACE_O_EXITKILL = 1 << 20
PTRACE_O_SUSPEND_SECCOMP = 1 << 21
PTRACE_SYSCALL = 24
SYSCALL_STOP = signal.SIGTRAP | 0x80
PTRACE_EVENT_STOP = 128
PTRACE_PEEKSIGINFO_SHARED = 1
NT_X86_XSTATE = 0x202
SIGINFO = 128
XSAVE_MAX = 16384
SECCOMP_FILTER_FLAG_LOG = 2


class Tracee:
    """A seized thread. Methods raise NoSuchProcess when it is gone, TraceeError when the kernel refuses."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.stop_signal = 0  # the group-stop signal when it was found stopped (state T)

    def _ptrace(self, request: int, addr: int = 0, data: int = 0) -> int:
        result = int(lib.lp_ptrace(request, self.tid, addr, data))
        if result == -errno.ESRCH:
            raise NoSuchProcess(
                "the thread is gone", where=f"thread {self.tid}", remedy="look whether it has ended"
            )
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
        result = int(lib.lp_ptrace(PTRACE_SEIZE, self.tid, 0, options))
        if result == -errno.ESRCH:
            raise NoSuchProcess("no such thread", where=f"thread {self.tid}", remedy="check the pid")
        if result == -errno.EPERM:
            raise PermissionDenied(
                "may not be traced",
                where=f"thread {self.tid}",
                remedy="run as root or its owner with CAP_SYS_PTRACE, and detach any debugger (TracerPid)",
            )
        check(result)

    def interrupt(self) -> None:
        self._ptrace(PTRACE_INTERRUPT)

    def wait_stop(self, timeout_ms: int) -> None:
        """Wait until the thread is in an event stop. TraceeError when it does not stop in time (D state)."""
        status = ffi.new("int *")
        while True:
            got = int(lib.lp_wait(self.tid, status, timeout_ms))
            if got == 0:
                raise TraceeError(
                    f"did not stop within {timeout_ms} ms (uninterruptible sleep?)",
                    where=f"thread {self.tid}",
                    remedy="wait for its I/O and try again",
                )
            if got < 0 or not os.WIFSTOPPED(status[0]):
                raise NoSuchProcess(
                    "ended while it was being frozen",
                    where=f"thread {self.tid}",
                    remedy="nothing is left to move",
                )
            if status[0] >> 16 == PTRACE_EVENT_STOP:
                self.stop_signal = _group_stop(os.WSTOPSIG(status[0]))
                return
            # A signal was on its way: deliver it after all, the interrupt follows.
            self._ptrace(PTRACE_CONT, 0, os.WSTOPSIG(status[0]))

    def cont(self, sig: int = 0) -> None:
        self._ptrace(PTRACE_CONT, 0, sig)

    def to_syscall_entry(self) -> None:
        """Continue up to the entry of the next system call (PTRACE_O_TRACESYSGOOD)."""
        status = ffi.new("int *")
        while True:
            self._ptrace(PTRACE_SYSCALL)
            check(lib.lp_wait(self.tid, status, -1))
            if not os.WIFSTOPPED(status[0]):
                raise NoSuchProcess(
                    "ended at a remote call", where=f"thread {self.tid}", remedy="look why"
                )
            if status[0] >> 8 == SYSCALL_STOP:
                return

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

    def xsave(self) -> bytes:
        """The whole NT_X86_XSTATE area; its size is the kernel's answer (AMX: 11008 bytes), not a constant."""
        buffer = bytearray(XSAVE_MAX)
        iov = ffi.new("uint64_t[2]", [_address(buffer), len(buffer)])
        self._ptrace(PTRACE_GETREGSET, NT_X86_XSTATE, _address(iov))
        return bytes(buffer[: iov[1]])

    def set_xsave(self, xsave: bytes) -> None:
        iov = ffi.new("uint64_t[2]", [_address(xsave), len(xsave)])
        self._ptrace(PTRACE_SETREGSET, NT_X86_XSTATE, _address(iov))

    def blocked(self) -> int:
        """The signal mask; bit n-1 is signal n."""
        mask = ffi.new("uint64_t *")
        self._ptrace(PTRACE_GETSIGMASK, 8, _address(mask))
        return int(mask[0])

    def set_blocked(self, mask: int) -> None:
        value = ffi.new("uint64_t *", mask)
        self._ptrace(PTRACE_SETSIGMASK, 8, _address(value))

    def pending(self, *, shared: bool) -> tuple[bytes, ...]:
        """The queued signals of the thread, or of its process, oldest first; siginfo of 128 bytes each."""
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

    def rseq(self) -> Rseq | None:
        """The rseq registration, None when there is none (include/uapi/linux/ptrace.h ptrace_rseq_configuration)."""
        out = bytearray(24)
        self._ptrace(PTRACE_GET_RSEQ_CONFIGURATION, len(out), _address(out))
        addr, size, signature = struct.unpack_from("<QII", out)
        return Rseq(addr, size, signature) if addr else None

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


def _group_stop(sig: int) -> int:
    """PTRACE_INTERRUPT alone reports SIGTRAP; a thread found in a group stop reports the stopping signal."""
    return 0 if sig == signal.SIGTRAP else sig


def _address(buffer: object) -> int:
    """Address of a bytes-like object or a cffi array; the caller keeps it alive during the call."""
    if isinstance(buffer, (bytes, bytearray)):
        buffer = ffi.from_buffer(buffer)
    return int(ffi.cast("uintptr_t", buffer))


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
        except OSError as error:
            raise self._failed("read", addr, length, error.strerror or "") from error
        if len(data) != length:
            raise self._failed("read", addr, length, f"got {len(data)} bytes")
        return data

    def write(self, addr: int, data: bytes) -> None:
        try:
            written = os.pwrite(self._fd, data, addr)
        except OSError as error:
            raise self._failed("write", addr, len(data), error.strerror or "") from error
        if written != len(data):
            raise self._failed("write", addr, len(data), f"wrote {written} bytes")

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
    except FileNotFoundError:
        raise NoSuchProcess("no such process", where=f"pid {pid}", remedy="check the pid") from None
    except PermissionError:
        raise PermissionDenied(
            "its memory may not be opened", where=f"pid {pid}", remedy="run as root or with CAP_SYS_PTRACE"
        ) from None
    try:
        yield Memory(fd, pid)
    finally:
        os.close(fd)
