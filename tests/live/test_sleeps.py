"""A child goes to sleep in each call that has a restart block, is frozen, and we say how long it has still to
sleep.

Two clocks are the oracle: the child's, read just before the call, and ours when it was first seen asleep. It began
between the two, however busy the machine is; what is left is that plus what it asked for minus the time of the freeze.
Ours may be longer by LATE: what the clock of a CPU leaves out while the child sleeps (see sleeps._clock_offsets), well
below what it has slept by then.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc, sleeps
from lazyproc.model import Registers
from tests.live.programs import wait_until

SECOND = 10**9
FULL = 20 * SECOND
SLEPT = SECOND // 4
LATE = SECOND // 10
SLEEPS = {arch.SYS[name] for name in ("nanosleep", "clock_nanosleep", "poll", "futex", "restart_syscall")}

# Every call is made by libc's own wrapper or by syscall(3), with 20 s as its time.
CHILD = """
import ctypes, sys, time
libc = ctypes.CDLL(None)
request, rest = (ctypes.c_long * 2)(20, 0), (ctypes.c_long * 2)(0, 0)
word, nobody = ctypes.c_uint(5), (ctypes.c_byte * 8)()
calls = {
    "nanosleep": lambda: libc.syscall(35, request, None),
    "nanosleep with rem": lambda: libc.syscall(35, request, rest),
    "nanosleep over its request": lambda: libc.syscall(35, request, request),
    "clock_nanosleep": lambda: libc.syscall(230, 1, 0, request, None),
    "clock_nanosleep with rem": lambda: libc.syscall(230, 1, 0, request, rest),
    "poll": lambda: libc.syscall(7, nobody, 0, 20000),
    "futex": lambda: libc.syscall(202, ctypes.byref(word), 128, 5, request, None, 0),
    "libc's clock_nanosleep": lambda: libc.clock_nanosleep(1, 0, request, None),
    "libc's poll": lambda: libc.poll(nobody, 0, 20000),
    "poll for ever": lambda: libc.poll(nobody, 0, -1),
    "futex with a deadline": lambda: libc.syscall(
        202, ctypes.byref(word), 128 | 9, 5, (ctypes.c_long * 2)(int(time.monotonic()) + 20, 0), None, -1),
    "clock_nanosleep of CPU time": lambda: libc.syscall(230, 2, 0, request, None),
}
call = calls[sys.argv[1]]
print(time.monotonic_ns(), flush=True)
call()
"""
EXACT = ["nanosleep with rem", "nanosleep over its request", "clock_nanosleep with rem"]
TIMED = ["nanosleep", "clock_nanosleep", "poll", "futex", "libc's clock_nanosleep", "libc's poll"]

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long
SEIZE, INTERRUPT, GETREGS, DETACH = 0x4206, 0x4207, 12, 17


class Sleeper:
    """The child; it went to sleep after `began_ns`, by its own account, and before it was `seen_ns` asleep."""

    def __init__(self, pid: int, began_ns: int) -> None:
        self.pid = pid
        self.began_ns = self.seen_ns = began_ns

    def observe(self) -> sleeps.SleepBefore | None:
        """Compares two clocks, and is late by no more than it takes."""
        began = time.monotonic_ns()
        found = sleeps.observe(self.pid, proc.task_ids(self.pid)).get(self.pid)
        self.seen_ns += time.monotonic_ns() - began
        return found

    def read_memory(self, addr: int, length: int) -> bytes:
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            return os.pread(memory.fileno(), length, addr)

    def asleep(self) -> bool:
        call = proc.syscall(proc.read(self.pid, "syscall"))
        return call is not None and call.nr in SLEEPS

    def wait_for_sleep(self) -> None:
        """Until it has been seen to sleep for a quarter second."""
        wait_until(self.asleep, "the child falls asleep")
        self.seen_ns = time.monotonic_ns()
        time.sleep(SLEPT / SECOND)


@contextmanager
def sleeper(call: str) -> Iterator[Sleeper]:
    with subprocess.Popen([sys.executable, "-c", CHILD, call], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            sleeping = Sleeper(child.pid, int(child.stdout.readline()))
            sleeping.wait_for_sleep()
            yield sleeping
        finally:
            child.kill()


@contextmanager
def frozen(pid: int) -> Iterator[tuple[Registers, int, int]]:
    """Registers, switches and the time of a child stopped by PTRACE_INTERRUPT."""
    ptrace(SEIZE, pid)
    ptrace(INTERRUPT, pid)
    assert os.waitpid(pid, 0)[0] == pid
    try:
        at = time.monotonic_ns()
        raw = ctypes.create_string_buffer(arch.REGISTERS.size)
        ptrace(GETREGS, pid, raw)
        yield arch.unpack_registers(raw.raw), proc.status(proc.read(pid, "status")).voluntary_switches, at
    finally:
        ptrace(DETACH, pid)


def ptrace(request: int, pid: int, data: object = None) -> None:
    if libc.ptrace(request, pid, None, data) == -1:
        raise OSError(ctypes.get_errno(), f"ptrace {request:#x}")


def frozen_rest(child: Sleeper, before: sleeps.SleepBefore | None) -> tuple[int, int, int]:
    """The least that is left, what we say, and the most."""
    with frozen(child.pid) as (registers, switches, at):
        assert arch.restart_code(registers) == arch.ERESTART_RESTARTBLOCK
        restart = sleeps.remaining(before, registers, switches, at, child.read_memory)
        assert restart is not None
        return child.began_ns + FULL - at, restart.remaining_ns, child.seen_ns + FULL + LATE - at


@pytest.mark.parametrize("call", TIMED + EXACT)
def test_the_rest_of_a_sleep_is_known(call: str) -> None:
    with sleeper(call) as child:
        least, ours, most = frozen_rest(child, child.observe())
        assert least <= ours <= most


@pytest.mark.parametrize("call", EXACT)
def test_where_the_kernel_wrote_the_rest_nothing_need_be_observed(call: str) -> None:
    with sleeper(call) as child:
        least, ours, most = frozen_rest(child, None)
        assert least <= ours <= most


def test_an_unobserved_sleep_starts_afresh() -> None:
    with sleeper("nanosleep") as child:
        assert frozen_rest(child, None)[1] == FULL


def test_a_thread_that_ran_since_starts_afresh() -> None:
    """The observation is stale: a freeze that was taken back has woken the thread in between."""
    with sleeper("poll") as child:
        before = child.observe()
        with frozen(child.pid):
            pass
        child.wait_for_sleep()
        # syscall(3) leaves no number in the code: the child stands in restart_syscall for good.
        with frozen(child.pid) as (registers, switches, at):
            assert before is not None
            assert switches > before.voluntary_switches + 1
            assert sleeps.remaining(before, registers, switches, at, child.read_memory) is None


@pytest.mark.parametrize("call", ["libc's clock_nanosleep", "libc's poll"])
def test_a_sleep_interrupted_twice_is_never_cut_short(call: str) -> None:
    """After the first freeze the child sleeps in restart_syscall; when it began is not known any more."""
    with sleeper(call) as child:
        with frozen(child.pid) as (registers, _, _):
            number = registers.orig_ax
        child.wait_for_sleep()
        least, ours, _ = frozen_rest(child, child.observe())
        assert least <= ours <= FULL
        with frozen(child.pid) as (registers, _, _):
            assert registers.orig_ax == arch.SYS["restart_syscall"]
            assert sleeps.interrupted_number(registers, child.read_memory) == number


@pytest.mark.parametrize("call", ["poll for ever", "futex with a deadline"])
def test_a_call_without_a_relative_time_is_made_again_as_it_is(call: str) -> None:
    with sleeper(call) as child:
        before = child.observe()
        with frozen(child.pid) as (registers, switches, at):
            assert arch.restart_code(registers) == arch.ERESTART_RESTARTBLOCK
            assert sleeps.remaining(before, registers, switches, at, child.read_memory) is None
            assert sleeps.interrupted_number(registers, child.read_memory) == registers.orig_ax


def test_a_sleep_of_cpu_time_does_not_pass_with_time() -> None:
    with sleeper("clock_nanosleep of CPU time") as child:
        assert frozen_rest(child, child.observe())[1] == FULL


def test_only_sleepers_are_seen() -> None:
    """A thread that computes and one that waits in read(2) have no restart block."""
    reading, writing = os.pipe()
    waiter = threading.Thread(target=os.read, args=(reading, 1))
    waiter.start()
    try:
        assert sleeps.observe(os.getpid(), proc.task_ids(os.getpid())) == {}
    finally:
        os.write(writing, b"x")
        waiter.join()
        os.close(reading)
        os.close(writing)


def test_observing_leaves_our_own_affinity_alone() -> None:
    before = os.sched_getaffinity(0)
    with sleeper("poll") as child:
        assert child.observe() is not None
    assert os.sched_getaffinity(0) == before


def test_a_thread_that_is_gone_is_left_out() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert sleeps.observe(child.pid, [child.pid]) == {}


def test_a_stopped_sleeper_is_never_cut_short() -> None:
    """SIGSTOP interrupts the sleep before we look at it."""
    with sleeper("poll") as child:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        least, ours, _ = frozen_rest(child, child.observe())
        os.kill(child.pid, signal.SIGCONT)
        assert least <= ours <= FULL
