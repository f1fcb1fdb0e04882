"""System calls inside a tracee: one at a time, or as a program of many run in one stop.

A *bench* is a spare mapping in the tracee: one page of code (a loop that walks a table of calls) and a data area
(tables, arguments, results, one signal frame per thread). Whatever a thread runs there ends in rt_sigreturn from
its frame, so that a tracer killed at any instruction leaves the thread with its own registers, vector state and
mask, and the process with at worst one spare mapping. While the tracer lives, the end of a program is a signal
(not a trap: a forced SIGTRAP would reset the process's own action) that stops the thread and is swallowed.

The bench itself is mapped by a *stub*: `syscall; rt_sigreturn` in the zero padding behind the vdso's code, with its
frame in dead stack. Both places are put back afterwards.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from lazyproc.errors import NoSuchProcess, TraceeError
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel._core import ffi, lib
from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.kernel.proc import MapsEntry
from lazyproc.kernel.tracee import Memory, Tracee
from lazyproc.model import PAGE, Registers

MAP_FIXED_NOREPLACE = 0x100000
MAY_FAIL = 1 << 32
ROW = struct.Struct("<q6Qq")
FRAME_SIZE = 16384  # a signal frame with AMX state is 12.4 KiB
STACK_GAP = 1 << 20  # kernel's stack_guard_gap: 256 pages
ENTER_MS = 1000
ENDINGS = (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD)  # ignored by default


def _blob() -> bytes:
    size = ffi.new("size_t *")
    start = lib.lp_blob(size)
    return bytes(ffi.buffer(start, size[0]))


BLOB = _blob()
LOOP = int(lib.lp_blob_loop())
STUB = BLOB[lib.lp_blob_stub() : lib.lp_blob_stub_end()]


@dataclass(frozen=True, slots=True)
class Call:
    """One remote system call. `may_fail`: its error is a result; otherwise it ends the program."""

    name: str
    args: tuple[int, ...] = ()
    may_fail: bool = False


@dataclass(frozen=True, slots=True)
class Saved:
    """A thread as it was frozen."""

    registers: Registers
    xsave: bytes
    blocked: int


def save(tracee: Tracee) -> Saved:
    return Saved(tracee.registers(), tracee.xsave(), tracee.blocked())


def put_back(tracee: Tracee, saved: Saved) -> None:
    """Registers and mask as they were. Vector state is untouched by a program, which is integer code only."""
    tracee.set_registers(saved.registers)
    tracee.set_blocked(saved.blocked)


def ending_signal(caught: int, pending: int) -> int:
    """The signal that ends programs: one that the process does not handle and that is not pending already.

    Were the tracer dead, an unhandled one of these is dropped at once; SIGURG is harmless where all are handled.
    """
    for sig in ENDINGS:
        if not (caught | pending) >> (sig - 1) & 1:
            return sig
    return signal.SIGURG


def find_hole(maps: Sequence[tuple[int, int]], size: int) -> int:
    """The address of a hole for `size` bytes between mappings (start, end), away from any stack that may grow."""
    floor = 1 << 20
    previous = floor
    for start, end in [*maps, (arch.TASK_SIZE, arch.TASK_SIZE)]:
        if start > arch.TASK_SIZE:
            continue
        if start - STACK_GAP - size >= max(previous + STACK_GAP, floor):
            return start - STACK_GAP - size
        previous = max(previous, end)
    raise TraceeError("no hole in the address space", where=f"{size} bytes", remedy="unmap something")


@dataclass(slots=True)
class Bench:
    """Code and data mapped into a tracee, and programs run there."""

    memory: Memory
    code: int  # address of the blob
    data: int  # address of the data area
    size: int  # bytes of the data area
    ending: int
    _image: bytearray = field(default_factory=bytearray)

    def place(self, content: bytes, align: int = 16) -> int:
        """Put bytes (or room for results) into the data area; the address is valid until the next run."""
        self._image += bytes(-len(self._image) % align)
        addr = self.data + len(self._image)
        self._image += content
        if len(self._image) > self.size:
            raise TraceeError(
                f"program of {len(self._image)} bytes is larger than the bench",
                where=f"{addr:#x}",
                remedy="report it",
            )
        return addr

    def room(self, length: int, align: int = 16) -> int:
        return self.place(bytes(length), align)

    def run(self, tracee: Tracee, calls: Sequence[Call], frame: int | None = None) -> list[int]:
        """Run one thread's program; the results in order. TraceeError names the first call that failed."""
        return self.run_all([(tracee, calls, frame)])[0]

    def run_all(self, programs: Sequence[tuple[Tracee, Sequence[Call], int | None]]) -> list[list[int]]:
        """Run the programs of several threads at the same time, each with its dead man's frame (None: it has none)."""
        jobs = ffi.new("struct lp_job[]", len(programs))
        tables = []
        for job, (tracee, calls, frame) in zip(jobs, programs, strict=True):
            table = b"".join(_row(call) for call in calls)
            tables.append((self.place(table), len(table)))
            job.tid, job.signal, job.entry = tracee.tid, self.ending, self.code + LOOP
            job.frame, job.rows, job.count = frame or self.data, tables[-1][0], len(calls)
        self.memory.write(self.data, bytes(self._image))
        self._image.clear()
        failed = int(lib.lp_run(jobs, len(programs)))
        self._resend(jobs)
        if failed < 0:
            raise _ended_badly(jobs)
        return [
            _results(tracee, calls, self.memory.read(addr, length))
            for (tracee, calls, _), (addr, length) in zip(programs, tables, strict=True)
        ]

    def _resend(self, jobs: Sequence[ffi.CData]) -> None:
        """The ending signal that somebody else sent during the program was swallowed: send it again."""
        for job in jobs:
            if job.foreign:
                os.kill(job.tid, self.ending)


def _row(call: Call) -> bytes:
    nr = SYS[call.name] | (MAY_FAIL if call.may_fail else 0)
    args = (*(arg & arch.MASK64 for arg in call.args), 0, 0, 0, 0, 0, 0)[:6]
    return ROW.pack(nr, *args, 0)


def _results(tracee: Tracee, calls: Sequence[Call], table: bytes) -> list[int]:
    results = [row[7] for row in ROW.iter_unpack(table)]
    for call, result in zip(calls, results, strict=True):
        if -4096 < result < 0 and not call.may_fail:
            args = ", ".join(f"{arg:#x}" for arg in call.args)
            raise TraceeError(
                f"{call.name}({args}) failed: {os.strerror(-result)}",
                where=f"thread {tracee.tid}",
                remedy="see dmesg",
            )
    return results


def _ended_badly(jobs: Sequence[ffi.CData]) -> TraceeError | NoSuchProcess:
    for job in jobs:
        if job.status > 0 and not os.WIFSTOPPED(job.status):
            return NoSuchProcess(
                "ended during a remote program", where=f"thread {job.tid}", remedy="look why"
            )
        if job.status:
            return TraceeError(
                f"remote program ended with status {job.status:#x}",
                where=f"thread {job.tid}",
                remedy="report it",
            )
    raise AssertionError("a program failed and no job says so")


def frame_bytes(saved: Saved, addr: int) -> bytes:
    """The signal frame for `addr` from which rt_sigreturn resumes the thread as it was saved."""
    out = ffi.new("uint8_t[]", FRAME_SIZE)
    length = lib.lp_frame(
        out,
        FRAME_SIZE,
        addr,
        ffi.from_buffer(arch.pack_registers(saved.registers)),
        ffi.from_buffer(saved.xsave),
        len(saved.xsave),
        saved.blocked,
    )
    if length < 0:
        raise TraceeError(
            f"no signal frame for {len(saved.xsave)} bytes of xsave: {os.strerror(-length)}",
            where=f"{addr:#x}",
            remedy="report it",
        )
    return bytes(ffi.buffer(out, length))


def step(tracee: Tracee, registers: Registers) -> int:
    """Execute the one `syscall` instruction at registers.ip; the thread is at an event stop behind it."""
    result = ffi.new("int64_t *")
    failed = int(lib.lp_step(tracee.tid, ffi.from_buffer(arch.pack_registers(registers)), result))
    if failed < 0:
        raise TraceeError(
            f"could not make a system call: {os.strerror(-failed)}",
            where=f"thread {tracee.tid}",
            remedy="report it",
        )
    return int(result[0])


# --- a bench in a process that must survive us -------------------------------------------------------------------


def _padding(maps: Sequence[MapsEntry], memory: Memory) -> int:
    """An executable place for the stub whose bytes mean nothing: zeros at the end of the vdso or of a code segment."""
    executable = [m for m in maps if "x" in m.perms and m.path != "[vsyscall]"]
    for entry in sorted(executable, key=lambda m: m.path != "[vdso]"):
        addr = entry.end - 64
        if memory.read(addr, 64) == bytes(64):
            return addr
    raise TraceeError(
        "no executable padding for a remote call", where="process", remedy="report it with its maps"
    )


def _dead_stack(maps: Sequence[MapsEntry], saved: Sequence[Saved]) -> int:
    """Room for one frame below everything that lives on the main stack.

    Below the red zone of the lowest stack pointer nothing lives (System V ABI); where no thread stands on the main
    stack now (coroutines, an alternate stack), its lowest pages serve, which only the deepest recursion ever uses.
    """
    stack = next((m for m in maps if m.path == "[stack]"), None)
    if stack is None:
        raise TraceeError("has no [stack] mapping", where="process", remedy="report it with its maps")
    pointers = [s.registers.sp for s in saved if stack.start <= s.registers.sp < stack.end]
    if not pointers:
        return stack.start
    addr = (min(pointers) - arch.RED_ZONE - FRAME_SIZE) & ~63
    if addr < stack.start:
        raise TraceeError(
            "its main stack is used to the last page",
            where=f"{stack.start:#x}",
            remedy="try again a moment later",
        )
    return addr


@dataclass(slots=True)
class _Stub:
    """The one-call stub in a process, with what lay there before."""

    tracee: Tracee
    memory: Memory
    saved: Saved
    addr: int
    frame: int
    before: tuple[bytes, bytes]

    def call(self, name: str, *args: int) -> int:
        registers = arch.calling(self.saved.registers, self.addr, self.frame + 8, SYS[name], args)
        result = step(self.tracee, registers)
        if -4096 < result < 0:
            raise TraceeError(
                f"{name} failed: {os.strerror(-result)}",
                where=f"pid {self.tracee.tid}",
                remedy="see its limits",
            )
        return result


@contextmanager
def _stub(
    tracee: Tracee, memory: Memory, maps: Sequence[MapsEntry], saved: Sequence[Saved]
) -> Iterator[_Stub]:
    addr, frame = _padding(maps, memory), _dead_stack(maps, saved)
    content = frame_bytes(saved[0], frame)
    before = memory.read(addr, len(STUB)), memory.read(frame, len(content))
    # The frame first: once the stub stands, a dead tracer's tracee may return through it.
    memory.write(frame, content)
    memory.write(addr, STUB)
    tracee.set_blocked(arch.MASK64)
    try:
        yield _Stub(tracee, memory, saved[0], addr, frame, before)
    finally:
        put_back(tracee, saved[0])
        memory.write(addr, before[0])
        memory.write(frame, before[1])


@contextmanager
def borrowed(
    tracees: Sequence[Tracee],
    memory: Memory,
    maps: Sequence[MapsEntry],
    *,
    ending: int,
    size: int = 1 << 18,
) -> Iterator[tuple[Bench, list[Saved], list[int]]]:
    """Borrow a frozen process: a bench in it, its threads' saved state and dead man's frames (in their order).

    On leaving everything is as it was: mapping gone, registers and masks back. `tracees[0]` is the leader.
    """
    saved = [save(tracee) for tracee in tracees]
    frames_size = FRAME_SIZE * len(tracees)
    hole = find_hole([(m.start, m.end) for m in maps], PAGE + frames_size + size)
    with _stub(tracees[0], memory, maps, saved) as stub:
        # Two mappings, since a process may forbid itself memory that is writable and executable (PR_SET_MDWE).
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        stub.call("mmap", hole, PAGE, mmap.PROT_READ | mmap.PROT_EXEC, flags, -1, 0)
        try:
            stub.call("mmap", hole + PAGE, frames_size + size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
            frames = [hole + PAGE + FRAME_SIZE * index for index in range(len(tracees))]
            memory.write(hole, BLOB)
            for state, frame in zip(saved, frames, strict=True):
                memory.write(frame, frame_bytes(state, frame))
            yield Bench(memory, hole, hole + PAGE + frames_size, size, ending), saved, frames
        finally:
            # Others first: until they are put back their way home leads through the bench.
            for tracee, state in zip(tracees[1:], saved[1:], strict=True):
                put_back(tracee, state)
            stub.call("munmap", hole, PAGE + frames_size + size)


def enter_and_interrupt(tracee: Tracee, registers: Registers) -> int:
    """Make the system call at registers.ip and interrupt it at once; what it left in ax, as an unsigned number.

    The interrupt is already pending when the call begins to sleep, so a sleep returns -ERESTART_RESTARTBLOCK with
    its restart block armed, and anything that needs no sleep returns its result.
    """
    tracee.set_registers(registers)
    tracee.to_syscall_entry()
    tracee.interrupt()
    tracee.cont()
    tracee.wait_stop(ENTER_MS)
    return tracee.registers().ax
