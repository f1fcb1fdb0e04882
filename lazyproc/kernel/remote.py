"""System calls inside a tracee: one at a time, or as a program of many run in one stop.

A *bench* is a spare mapping in the tracee: code (a loop that walks a table of calls, and each thread's way home)
and a data area (tables, arguments, results). A program uses no stack and leaves the stack pointer alone; it ends by
a signal, not by a trap: a forced SIGTRAP would reset the process's own action. While the tracer lives, the signal
stops the thread and is swallowed. Were the tracer killed, at any instruction, the signal is ignored and the thread
goes home by itself: code that loads its own mask and registers and jumps back (docs/adr/0001-remote-programs.md).

The bench itself is mapped by a *stub*: `syscall` and the way home, in the zero padding behind the vdso's code.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from lazyproc.errors import NoSuchProcess, TraceeError
from lazyproc.facts import dataclass, field
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel._core import ffi, lib
from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.kernel.padding import padding
from lazyproc.kernel.proc import MapsEntry
from lazyproc.kernel.tracee import Memory, State, Tracee
from lazyproc.model import PAGE, Registers

MAP_FIXED_NOREPLACE = 0x100000
MAY_FAIL, INSTRUCTION = 1 << 32, 1 << 33
XRSTOR = "xrstor"
ROW = struct.Struct("<q6Qq")
COLUMNS = ROW.size // 8
BENCH = 1 << 18  # bytes of a bench's data area where nobody knows better
STACK_GAP = 1 << 20  # kernel's stack_guard_gap: 256 pages
ENDINGS = (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD)  # ignored by default


def _blob() -> bytes:
    size = ffi.new("size_t *")
    start = lib.lp_blob(size)
    return bytes(ffi.buffer(start, size[0]))


BLOB = _blob()
LOOP = int(lib.lp_blob_loop())
SYSCALL = int(lib.lp_blob_syscall())  # a `syscall` instruction in the blob
HOME_ALIGN = 16
HOME_ROOM = -(-arch.HOME_SIZE // HOME_ALIGN) * HOME_ALIGN


class Call(NamedTuple):
    """One remote system call. `may_fail`: its error is a result; otherwise it ends the program.

    Or the instruction XRSTOR (address of the area, low and high half of the mask), for processes that die with us: it
    changes vector state, which no way home puts back. A tuple, not a dataclass: an address space takes thousands.
    """

    name: str
    args: tuple[int, ...] = ()
    may_fail: bool = False


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
    """Code and data mapped into a tracee, and programs run there.

    `homes` are the addresses of the threads' ways home, by tid; a process that dies with its tracer needs none.
    """

    memory: Memory
    code: int  # address of the blob
    data: int  # address of the data area
    size: int  # bytes of the data area
    ending: int
    homes: Mapping[int, int] = field(default_factory=dict)
    _image: bytearray = field(default_factory=bytearray)
    _after: bytes = b""

    def place(self, content: bytes, align: int = 16) -> int:
        """Put bytes (or room for results) into the data area; the address is valid until the next run."""
        self._image += bytes(-len(self._image) % align)
        addr = self.data + len(self._image)
        self._image += content
        if len(self._image) > self.size:
            raise TraceeError(
                f"a program of {len(self._image)} bytes is larger than the bench",
                where=f"{addr:#x}",
                remedy="report it",
            )
        return addr

    def room(self, length: int, align: int = 16) -> int:
        return self.place(bytes(length), align)

    def read(self, addr: int, length: int) -> bytes:
        """What the last run left at a place of its own."""
        return self._after[addr - self.data : addr - self.data + length]

    def run(self, tracee: Tracee, calls: Sequence[Call]) -> list[int]:
        """Run one thread's program; the results in order. TraceeError names the first call that failed."""
        return self.run_all([(tracee, calls)])[0]

    def run_all(self, programs: Sequence[tuple[Tracee, Sequence[Call]]]) -> list[list[int]]:
        """Run the programs of several threads at the same time.

        A signal that arrives meanwhile stays pending with what came along with it.
        """
        jobs = ffi.new("struct lp_job[]", len(programs))
        for job, (tracee, calls) in zip(jobs, programs, strict=True):
            job.tid, job.signal, job.count = tracee.tid, self.ending, len(calls)
            job.entry, job.home = self.code + LOOP, self.homes.get(tracee.tid, 0)
            job.rows = self.place(b"".join([_row(call) for call in calls]))
        self._after = b""
        self.memory.write(self.data, bytes(self._image))
        failed = int(lib.lp_run(jobs, len(programs)))
        self._after = self.memory.read(self.data, len(self._image))
        self._image.clear()
        if failed < 0:
            raise _ended_badly(jobs)
        results = [
            _results(tracee, calls, self.read(job.rows, ROW.size * len(calls)))
            for job, (tracee, calls) in zip(jobs, programs, strict=True)
        ]
        self._send_again([tracee for tracee, _ in programs], jobs)
        return results

    def _send_again(self, tracees: Sequence[Tracee], jobs: Sequence[ffi.CData]) -> None:
        """Make pending again what was swallowed: SIGSTOP, and the ending signal when it came from elsewhere."""
        after = self._after
        for tracee, job in zip(tracees, jobs, strict=True):
            if job.stop_again:
                os.kill(tracee.tid, signal.SIGSTOP)
            if job.foreign[0]:
                self._queue_again(tracees[0], bytes(job.siginfo[0]), to_process=True)
            if job.foreign[1]:
                self._queue_again(tracee, bytes(job.siginfo[1]), to_process=False)
        self._after = after

    def _queue_again(self, tracee: Tracee, siginfo: bytes, *, to_process: bool) -> None:
        """Only the process itself can give a signal any sender, and to itself as a whole only its leader
        (rt_sigqueueinfo(2)): so this is one more program, with another end.
        """
        sig = self.ending
        self.ending = next(other for other in ENDINGS if other != sig)
        try:
            tgid, tid = self.run(tracee, [Call("getpid"), Call("gettid")])
            info = self.place(siginfo)
            if to_process and tgid == tid:
                self.run(tracee, [Call("rt_sigqueueinfo", (tgid, sig, info))])
            else:
                self.run(tracee, [Call("rt_tgsigqueueinfo", (tgid, tid, sig, info))])
        finally:
            self.ending = sig


_NO_ARGS = (0, 0, 0, 0, 0, 0)


def _row(call: Call) -> bytes:
    name, args, may_fail = call
    nr = INSTRUCTION if name == XRSTOR else SYS[name] | may_fail << 32
    args += _NO_ARGS[len(args) :]
    try:
        return ROW.pack(nr, *args, 0)
    except struct.error:  # a negative one
        return ROW.pack(nr, *(arg & arch.MASK64 for arg in args), 0)


def _results(tracee: Tracee, calls: Sequence[Call], table: bytes) -> list[int]:
    """The last column of the rows."""
    results = array("q", table)[COLUMNS - 1 :: COLUMNS].tolist()
    if results and min(results) < 0:
        for call, result in zip(calls, results, strict=True):
            if -4096 < result < 0 and not call.may_fail:
                raise _call_failed(tracee, call.name, call.args, result)
    return results


def _call_failed(tracee: Tracee, name: str, args: Sequence[int], result: int) -> TraceeError:
    words = ", ".join(f"{arg:#x}" for arg in args)
    return TraceeError(
        f"{name}({words}) failed: {os.strerror(-result)}",
        where=f"thread {tracee.tid}",
        remedy=f"see {name}(2) and the limits of the process",
    )


_UNFINISHED = {
    errno.ETIMEDOUT: "does not return",
    errno.EFAULT: "ended in a fault",
}


def _unfinished(tid: int, error: int) -> TraceeError | NoSuchProcess:
    """Why a remote call or program did not come to its end; `error` is a positive errno."""
    if error in (errno.ESRCH, errno.ECHILD):
        return NoSuchProcess(
            "ended during a remote call",
            where=f"thread {tid}",
            remedy="see who killed it (dmesg, its parent)",
        )
    why = _UNFINISHED.get(error, f"could not be made: {os.strerror(error)}")
    return TraceeError(f"a remote call {why}", where=f"thread {tid}", remedy="report it")


def _ended_badly(jobs: Sequence[ffi.CData]) -> TraceeError | NoSuchProcess:
    return next(_unfinished(job.tid, -job.error) for job in jobs if job.error < 0)


def step(tracee: Tracee, registers: Registers) -> int:
    """Execute the one `syscall` instruction at registers.ip; the thread is at an event stop behind it.

    All its signals are blocked from then on.
    """
    result = ffi.new("int64_t *")
    done = int(lib.lp_step(tracee.tid, ffi.from_buffer(arch.pack_registers(registers)), result))
    if done < 0:
        raise _unfinished(tracee.tid, -done)
    if done:
        os.kill(tracee.tid, signal.SIGSTOP)
    return int(result[0])


def fall_asleep(calls: Sequence[tuple[Tracee, Registers]]) -> list[int]:
    """The same in several threads at once, each call interrupted as soon as it sleeps: a sleep then returns
    -ERESTART_RESTARTBLOCK with its restart block armed, and anything that needs no sleep its result.
    """
    sleeps = ffi.new("struct lp_sleep[]", len(calls))
    for sleep, (tracee, registers) in zip(sleeps, calls, strict=True):
        sleep.tid, sleep.registers = tracee.tid, registers
    if lib.lp_sleep(sleeps, len(calls)) < 0:
        raise next(_unfinished(sleep.tid, -sleep.error) for sleep in sleeps if sleep.error < 0)
    for sleep in sleeps:
        if sleep.error:
            os.kill(sleep.tid, signal.SIGSTOP)
    return [int(sleep.result) for sleep in sleeps]


# --- a bench in a process that must survive us -------------------------------------------------------------------


def put_back(tracee: Tracee, state: State) -> None:
    """Mask and registers as they were, in this order: between the two a dead tracer's thread is on its way home."""
    tracee.set_blocked(state.blocked)
    tracee.set_registers(state.registers)


STUB_ROOM = len(arch.SYSCALL_INSTRUCTION) + arch.HOME_SIZE


def _is_stub(content: bytes) -> bool:
    return content.startswith(arch.SYSCALL_INSTRUCTION) and bool(
        arch.HOME.fullmatch(content, len(arch.SYSCALL_INSTRUCTION))
    )


@dataclass(slots=True)
class Stub:
    """The one-call stub at `addr`, run by one thread."""

    tracee: Tracee
    state: State
    addr: int

    def call(self, name: str, *args: int) -> int:
        """What it returns. Raises TraceeError when it fails."""
        result = step(self.tracee, arch.calling(self.state.registers, self.addr, SYS[name], args))
        if -4096 < result < 0:
            raise _call_failed(self.tracee, name, args, result)
        return result


@contextmanager
def lone_stub(tracee: Tracee, state: State, memory: Memory, maps: Sequence[MapsEntry]) -> Iterator[Stub]:
    """Single calls in one stopped thread of a process whose other threads may run: the padding is nobody's code."""
    with _stub(tracee, [state], memory, maps) as stub:
        yield stub


@contextmanager
def _stub(
    tracee: Tracee, states: Sequence[State], memory: Memory, maps: Sequence[MapsEntry]
) -> Iterator[Stub]:
    """`states` are those of all stopped threads, the first one's being `tracee`'s."""
    ips = (state.registers.ip for state in states)
    state, addr = states[0], padding(maps, memory, STUB_ROOM, behind=0, stale=_is_stub, ips=ips)
    memory.write(addr, arch.SYSCALL_INSTRUCTION + arch.way_home(state.registers, state.blocked))
    try:
        yield Stub(tracee, state, addr)
    finally:
        put_back(tracee, state)
        memory.write(addr, bytes(STUB_ROOM))


def code_size(threads: int) -> int:
    """Bytes of a bench's code: the loop, and the way home of each thread."""
    code = len(BLOB) + -len(BLOB) % HOME_ALIGN + HOME_ROOM * threads
    return (code + PAGE - 1) & -PAGE


@contextmanager
def borrowed(
    tracees: Sequence[Tracee],
    states: Sequence[State],
    memory: Memory,
    maps: Sequence[MapsEntry],
    *,
    ending: int,
    size: int = BENCH,
) -> Iterator[Bench]:
    """Borrow a frozen process, whose threads are in these states (the leader's first): a bench in it.

    On leaving everything is as it was: mapping gone, registers and masks back.
    """
    refuse_unfit(tracees, states)
    code = code_size(len(tracees))
    hole = find_hole([(m.start, m.end) for m in maps], code + size)
    with _stub(tracees[0], states, memory, maps) as stub:
        # Two mappings, since a process may forbid itself memory that is writable and executable (PR_SET_MDWE).
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        stub.call("mmap", hole, code, mmap.PROT_READ | mmap.PROT_EXEC, flags, -1, 0)
        try:
            stub.call("mmap", hole + code, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
            homes = _write_code(hole, tracees, states, memory)
            yield Bench(memory, hole, hole + code, size, ending, homes)
        finally:
            # Others first: until they are put back their way home leads through the bench.
            for tracee, state in zip(tracees[1:], states[1:], strict=True):
                put_back(tracee, state)
            stub.call("munmap", hole, code + size)


def refuse_unfit(tracees: Sequence[Tracee], states: Sequence[State]) -> None:
    """Raises TraceeError for a thread that is in 32-bit code, where our instructions mean something else, and for one
    that would get our calls as SIGSYS: forced on it while that is blocked it resets the program's own action.
    """
    for tracee, state in zip(tracees, states, strict=True):
        if not arch.is_64bit(state.registers):
            raise TraceeError(
                "runs 32-bit code", where=f"thread {tracee.tid}", remedy="use a 64-bit build of the program"
            )
        if tracee.dispatches_calls():
            raise TraceeError(
                "gets its own system calls as signals (PR_SET_SYSCALL_USER_DISPATCH, as Wine does)",
                where=f"thread {tracee.tid}",
                remedy="it can be moved when the program has turned that off",
            )


def _write_code(
    at: int, tracees: Sequence[Tracee], states: Sequence[State], memory: Memory
) -> dict[int, int]:
    """The blob and each thread's way home; the addresses of these, by tid."""
    code = bytearray(BLOB)
    homes = {}
    for tracee, state in zip(tracees, states, strict=True):
        code += bytes(-len(code) % HOME_ALIGN)
        homes[tracee.tid] = at + len(code)
        code += arch.way_home(state.registers, state.blocked)
    memory.write(at, bytes(code))
    return homes
