"""What remote calls could do to the process they are made in, and do not: every test is a dump that is taken back."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazyproc.dump.before import observed_sleeps
from lazyproc.dump.freeze import FrozenTask, frozen_tree
from lazyproc.dump.gather import dumped
from lazyproc.errors import TraceeError
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc, remote
from lazyproc.kernel import sys as kernel
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel.proc_fdinfo import fdinfo
from lazyproc.kernel.remote import Bench, Call
from lazyproc.kernel.tracee import Tracee
from lazyproc.model import Rseq, TimerFd
from tests.live.programs import UNSUPPORTED, running, wait_until
from tests.live.tracees import freeze_and_let_go, frozen_and_dumped, state_of, tracee

SYS_RT_SIGQUEUEINFO, SYS_RT_TGSIGQUEUEINFO = 129, 297
SI_QUEUE = -1


@contextmanager
def borrowed(task: FrozenTask, ending: int) -> Iterator[tuple[Tracee, Bench]]:
    maps = proc.maps(proc.read(task.pid, "maps"))
    states = [stopped.state for stopped in task.stopped]
    with (
        ptrace.memory(task.pid) as memory,
        remote.borrowed(task.threads, states, memory, maps, ending=ending) as bench,
    ):
        yield task.threads[0], bench


# --- registers, signal state, critical sections -----------------------------------------------------------------


@pytest.mark.parametrize("trap", ["handled", "ignored", "blocked"])
def test_registers_vectors_masks_and_the_sigtrap_action_stay(trap: str, tmp_path: Path) -> None:
    with running("steady", trap, directory=tmp_path) as program:
        for _ in range(30):
            freeze_and_let_go(program.pid)
        program.watch.wait_beats(2)
        program.stop_and_verify()


def test_critical_sections_of_rseq_are_aborted(tmp_path: Path) -> None:
    """Its threads are in one nearly always; one that is not aborted counts wrong."""
    with running("rseq_loop", directory=tmp_path) as program:
        if program.process.poll() == UNSUPPORTED:
            pytest.skip("the C library registers no rseq")
        aborted = 0
        for _ in range(150):
            with frozen_tree(program.pid) as tree:
                task = tree.tasks[program.pid]
                aborted += sum(_stands_at_an_abort(task.pid, s.state.registers.ip) for s in task.stopped)
                with borrowed(task, signal.SIGURG) as (_, bench):
                    bench.run_all([(thread, [Call("getpid")]) for thread in task.threads])
        assert aborted > 0
        program.watch.wait_beats(2)
        program.stop_and_verify()


def _stands_at_an_abort(pid: int, ip: int) -> bool:
    """The signature before an abort handler: ud1 and RSEQ_SIG."""
    with ptrace.memory(pid) as memory:
        return memory.read(ip - 4, 4) == struct.pack("<I", 0x53053053)


# --- interrupted calls ------------------------------------------------------------------------------------------

EPOLL = """
static volatile sig_atomic_t flag;
static void on_usr1(int s) { (void)s; flag = 1; }
int main(int c, char **v)
{
    struct epoll_event event;
    struct sigaction action = { .sa_handler = on_usr1, .sa_flags = SA_RESTART };
    long began, got;
    (void)c;
    words = v;
    sigaction(SIGUSR1, &action, NULL);
    int set = epoll_create1(0);
    say("ready\\n", 0, 0, 0);
    began = now_ms();
    got = epoll_wait(set, &event, 1, atoi(v[2]));
    say("%ld %ld %ld\\n", got < 0 ? -errno : got, now_ms() - began, flag);
}
"""


def in_epoll(pid: int) -> bool:
    call = proc.syscall(proc.read(pid, "syscall"))
    return call is not None and call.nr == 232


def test_epoll_wait_does_not_see_a_freeze_and_ends_on_time(tmp_path: Path) -> None:
    """It is made again with what is left of its time; when that is over is then the kernel's affair."""
    with tracee(EPOLL, tmp_path, "1500") as it:
        wait_until(lambda: in_epoll(it.pid), "epoll_wait")
        seen_ns = time.monotonic_ns()
        time.sleep(0.3)
        with frozen_tree(it.pid, asleep=observed_sleeps(it.pid)) as tree, dumped(tree):
            slept_ms = (tree.frozen_at_ns - seen_ns) / 1e6
            left_ms = tree.tasks[it.pid].stopped[0].state.registers.r10
        got, took, _ = it.hear().split()
        assert got == "0"
        assert int(took) >= 1500
        assert left_ms < 1500 - slept_ms + 100  # kernel/sleeps.py may take it for somewhat longer


def test_epoll_wait_is_ended_by_a_signal_that_came_during_the_freeze(tmp_path: Path) -> None:
    with tracee(EPOLL, tmp_path, "-1") as it:
        wait_until(lambda: in_epoll(it.pid), "epoll_wait")
        with frozen_and_dumped(it.pid):
            os.kill(it.pid, signal.SIGUSR1)
        got, _, flag = it.hear().split()
        assert (int(got), flag) == (-errno.EINTR, "1")


def test_an_ignored_signal_does_not_end_epoll_wait(tmp_path: Path) -> None:
    """While it is traced even an ignored signal is queued."""
    with tracee(EPOLL, tmp_path, "-1") as it:
        wait_until(lambda: in_epoll(it.pid), "epoll_wait")
        with frozen_and_dumped(it.pid):
            os.kill(it.pid, signal.SIGWINCH)
        freeze_and_let_go(it.pid)
        wait_until(lambda: in_epoll(it.pid), "it still waits")
        os.kill(it.pid, signal.SIGUSR1)
        assert it.hear().split()[0] == str(-errno.EINTR)


WAITS = """
#include <linux/aio_abi.h>
#include <sys/socket.h>
#include <sys/time.h>
int main(int c, char **v)
{
    struct timeval long_time = { 100, 0 };
    struct timespec as_long = { 100, 0 };
    int sockets[2], listening = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr address = { .sa_family = AF_UNIX };
    aio_context_t ring = 0;
    struct io_event event;
    siginfo_t info;
    sigset_t usr1;
    char byte = 0;
    long got;
    (void)c;
    words = v;
    socketpair(AF_UNIX, SOCK_STREAM, 0, sockets);
    setsockopt(sockets[0], SOL_SOCKET, SO_RCVTIMEO, &long_time, sizeof(long_time));
    setsockopt(sockets[0], SOL_SOCKET, SO_SNDTIMEO, &long_time, sizeof(long_time));
    setsockopt(listening, SOL_SOCKET, SO_RCVTIMEO, &long_time, sizeof(long_time));
    bind(listening, &address, sizeof(address.sa_family));
    listen(listening, 1);
    syscall(SYS_io_setup, 1, &ring);
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    sigprocmask(SIG_BLOCK, &usr1, NULL);
    while (!strcmp(v[2], "send") && send(sockets[0], words, 64, MSG_DONTWAIT) > 0);
    say("ready\\n", 0, 0, 0);
    errno = 0;
    switch (v[2][0]) {
    case 'r': got = v[2][1] == 'd' ? read(sockets[0], &byte, 1) : recv(sockets[0], &byte, 1, 0); break;
    case 's': got = send(sockets[0], &byte, 1, 0); break;
    case 'a': got = accept(listening, NULL, NULL); break;
    case 'i': got = syscall(SYS_io_getevents, ring, 1, 1, &event, &as_long); break;
    default: got = sigtimedwait(&usr1, &info, &as_long);
    }
    say("%ld %ld\\n", got, errno, 0);
}
"""


WAITING_IN = {
    "recv": "recvfrom",
    "rd": "read",
    "send": "sendto",
    "accept": "accept",
    "io_getevents": "io_getevents",
    "wait": "rt_sigtimedwait",
}


@pytest.mark.parametrize("call", WAITING_IN)
def test_a_wait_that_has_no_restart_does_not_see_a_freeze(call: str, tmp_path: Path) -> None:
    def waits(pid: int) -> bool:
        blocked = proc.syscall(proc.read(pid, "syscall"))
        return blocked is not None and blocked.nr == arch.SYS[WAITING_IN[call]]

    with tracee(WAITS, tmp_path, call) as it:
        wait_until(lambda: waits(it.pid), call)
        freeze_and_let_go(it.pid)
        wait_until(lambda: waits(it.pid), f"{call} once more")
        if call == "wait":
            with frozen_and_dumped(it.pid):
                os.kill(it.pid, signal.SIGUSR1)
            assert it.hear() == f"{int(signal.SIGUSR1)} 0"


def test_a_sleep_at_the_source_ends_on_time(tmp_path: Path) -> None:
    source = """
    int main(int c, char **v)
    {
        struct timespec half = { 0, 500000000 };
        (void)c;
        words = v;
        say("ready\\n", 0, 0, 0);
        long began = now_ms(), got = nanosleep(&half, NULL);
        say("%ld %ld %ld\\n", got, now_ms() - began, now_ms());
    }
    """
    with tracee(source, tmp_path) as it:
        for _ in range(4):
            time.sleep(0.05)
            freeze_and_let_go(it.pid)
        let_go_ms = time.monotonic_ns() // 10**6
        got, took, ended_ms = map(int, it.hear().split())
        assert got == 0
        assert took >= 500
        assert ended_ms < let_go_ms + 500  # it did not begin anew


# --- positions ----------------------------------------------------------------------------------------------------


def test_the_position_of_a_memfd_that_nobody_maps_stays(tmp_path: Path) -> None:
    source = """
    int main(int c, char **v)
    {
        char text[10000] = { 1 };
        int fd = memfd_create("queue", MFD_CLOEXEC);
        (void)c;
        words = v;
        if (write(fd, text, sizeof(text)) < 0 || lseek(fd, 123, SEEK_SET) < 0) return 1;
        say("%ld\\n", fd, 0, 0);
        pause();
    }
    """
    with tracee(source, tmp_path) as it:
        (fd,) = (
            fd for fd in proc.descriptor_numbers(it.pid) if "memfd" in os.readlink(f"/proc/{it.pid}/fd/{fd}")
        )
        freeze_and_let_go(it.pid)
        assert fdinfo(proc.read(it.pid, f"fdinfo/{fd}")).pos == 123


TIMERS = """
#include <sys/timerfd.h>
int main(int c, char **v)
{
    struct sigevent silent = { .sigev_notify = SIGEV_NONE };
    struct itimerspec end = { { 0, 0 }, { atol(v[2]), 0 } };
    timer_t timer;
    (void)c;
    words = v;
    timerfd_settime(timerfd_create(CLOCK_MONOTONIC, 0), TFD_TIMER_ABSTIME, &end, NULL);
    timer_create(CLOCK_MONOTONIC, &silent, &timer);
    timer_settime(timer, TIMER_ABSTIME, &end, NULL);
    say("ready\\n", 0, 0, 0);
    for (;;) nanosleep(&end.it_value, NULL);
}
"""


def test_no_timer_of_the_copy_ends_before_its_time(tmp_path: Path) -> None:
    """By its own clock, which goes on from where the dump says."""
    end_s = time.monotonic_ns() // 10**9 + 100
    with tracee(TIMERS, tmp_path, str(end_s)) as it:
        wait_until(lambda: it.pid in observed_sleeps(it.pid), "it sleeps")
        with frozen_tree(it.pid, asleep=observed_sleeps(it.pid)) as tree, dumped(tree) as dump:
            (task,) = dump.checkpoint.tasks
            (timer,) = task.posix_timers
            (timerfd,) = (
                f.resource for f in dump.checkpoint.files.values() if isinstance(f.resource, TimerFd)
            )
            asleep, frozen_ns = task.leader.restart, tree.frozen_at_ns
            now_ns = dump.checkpoint.clocks.monotonic_ns
        end_ns = end_s * 10**9
        assert now_ns + timer.value_ns >= end_ns
        assert now_ns + timerfd.value_ns >= end_ns
        assert asleep is not None
        assert (
            now_ns + asleep.remaining_ns <= frozen_ns + end_ns
        )  # for as long as it was to sleep, and no longer


# --- signals that come during a program ---------------------------------------------------------------------------

WAITER = """
static void *other(void *a) { for (;;) pause(); return a; }
int main(int c, char **v)
{
    sigset_t set;
    siginfo_t info;
    pthread_t thread;
    (void)c;
    words = v;
    sigemptyset(&set);
    sigaddset(&set, SIGURG);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    pthread_create(&thread, NULL, other, NULL);
    say("ready\\n", 0, 0, 0);
    for (;;) {
        if (sigwaitinfo(&set, &info) < 0) continue;
        say("%ld %ld %ld\\n", info.si_code, info.si_pid, (long)info.si_value.sival_ptr);
    }
}
"""


def queue(pid: int, tid: int | None, value: int) -> None:
    info = ctypes.create_string_buffer(
        struct.pack("<iiiiiiq", signal.SIGURG, 0, SI_QUEUE, 0, os.getpid(), os.getuid(), value), 128
    )
    if tid is None:
        kernel.syscall(SYS_RT_SIGQUEUEINFO, pid, signal.SIGURG, ctypes.addressof(info))
    else:
        kernel.syscall(SYS_RT_TGSIGQUEUEINFO, pid, tid, signal.SIGURG, ctypes.addressof(info))


@pytest.mark.parametrize("to_thread", [False, True])
def test_the_ending_signal_sent_by_somebody_else_is_not_lost(to_thread: bool, tmp_path: Path) -> None:
    """It interrupts a program that it would end, and stays pending with its sender and value."""
    with tracee(WAITER, tmp_path) as it:
        with frozen_tree(it.pid) as tree:
            task = tree.tasks[it.pid]
            queue(it.pid, it.pid if to_thread else None, 0x1234567)
            with borrowed(task, signal.SIGURG) as (leader, bench):
                assert bench.run(leader, [Call("getpid")] * 3) == [it.pid] * 3
                assert bench.run(leader, [Call("getpid")]) == [it.pid]
        assert it.hear() == f"{SI_QUEUE} {os.getpid()} {0x1234567}"


def test_signals_sent_all_the_time_arrive_once_each(tmp_path: Path) -> None:
    source = """
    static volatile long count;
    static void on_rt(int s) { (void)s; count++; }
    int main(int c, char **v)
    {
        struct sigaction action = { .sa_handler = on_rt };
        (void)c;
        words = v;
        sigaction(SIGRTMIN, &action, NULL);
        say("ready\\n", 0, 0, 0);
        while (count < atol(v[2])) pause();
        say("%ld\\n", count, 0, 0);
        for (;;) pause();
    }
    """
    total = 300
    with tracee(source, tmp_path, str(total)) as it:

        def send() -> None:
            for _ in range(total):
                os.kill(it.pid, signal.SIGRTMIN)
                time.sleep(0.0005)

        sender = threading.Thread(target=send)
        sender.start()
        while sender.is_alive():
            freeze_and_let_go(it.pid)
        sender.join()
        assert it.hear() == str(total)


def test_a_stop_signal_that_comes_during_a_program_stops_it_afterwards(tmp_path: Path) -> None:
    with tracee(WAITER, tmp_path) as it:
        with frozen_tree(it.pid) as tree, borrowed(tree.tasks[it.pid], signal.SIGURG) as (leader, bench):
            os.kill(it.pid, signal.SIGSTOP)
            assert bench.run(leader, [Call("getpid")]) == [it.pid]
        wait_until(lambda: state_of(it.pid) == "T", "it is stopped")
        os.kill(it.pid, signal.SIGCONT)
        os.kill(it.pid, signal.SIGURG)
        assert it.hear().split()[0] == "0"


# --- processes that forbid themselves things, or look odd ---------------------------------------------------------


def test_a_process_that_denies_itself_writable_code(tmp_path: Path) -> None:
    source = """
    int main(int c, char **v)
    {
        (void)c;
        words = v;
        if (prctl(65 /* PR_SET_MDWE */, 1, 0, 0, 0) < 0) _exit(1);
        if (mmap(0, 4096, 7, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED) _exit(2);
        say("ready\\n", 0, 0, 0);
        for (;;) pause();
    }
    """
    with tracee(source, tmp_path) as it:
        freeze_and_let_go(it.pid)
        assert it.process.poll() is None


def test_a_process_in_strict_seccomp_mode(tmp_path: Path) -> None:
    """It may read, write and exit, nothing else; its own calls are still denied afterwards."""
    source = """
    int main(int c, char **v)
    {
        char byte;
        (void)c;
        words = v;
        int input = open(v[2], O_RDWR);
        say("ready\\n", 0, 0, 0);
        prctl(PR_SET_SECCOMP, 1);
        if (read(input, &byte, 1) == 1) getppid();
    }
    """
    fifo = tmp_path / "input"
    os.mkfifo(fifo)
    with tracee(source, tmp_path, str(fifo)) as it:
        wait_until(lambda: proc.status(proc.read(it.pid, "status")).seccomp == 1, "strict mode")
        with frozen_tree(it.pid) as tree:
            task = tree.tasks[it.pid]
            task.threads[0].set_options(ptrace.PTRACE_O_TRACESYSGOOD | ptrace.PTRACE_O_SUSPEND_SECCOMP)
            with borrowed(task, signal.SIGURG) as (leader, bench):
                assert bench.run(leader, [Call("getpid")]) == [it.pid]
        fifo.write_bytes(b"x")
        assert it.process.wait(5) == -signal.SIGKILL


DISPATCHER = """
static volatile char selector = 0;
static void on_sys(int s) { (void)s; selector = 0; }
int main(int c, char **v)
{
    struct sigaction action = { .sa_handler = on_sys };
    (void)c;
    words = v;
    sigaction(SIGSYS, &action, NULL);
    if (prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON, 0, 0, &selector)) return 1;
    say("ready\\n", 0, 0, 0);
    for (selector = 1; selector;);
}
"""


def test_a_thread_that_gets_its_own_system_calls_as_signals(tmp_path: Path) -> None:
    with tracee(DISPATCHER, tmp_path) as it:
        wait_until(lambda: state_of(it.pid) == "R", "it runs")
        before = proc.status(proc.read(it.pid, "status")).sig_caught
        with pytest.raises(TraceeError, match="gets its own system calls as signals"):
            freeze_and_let_go(it.pid)
        assert proc.status(proc.read(it.pid, "status")).sig_caught == before
        assert state_of(it.pid) == "R"


def test_a_static_program_without_a_library(tmp_path: Path) -> None:
    """No libc, no rseq, no robust list, no thread pointer; it spins and checks a register and its stack."""
    code, binary = tmp_path / "bare.S", tmp_path / "bare"
    code.write_text("""
        .globl _start
    _start: movq $0x1234, %rbx
        pushq $0x5678
    1:  movl $200000, %ecx
    2:  decl %ecx
        jnz 2b
        cmpq $0x1234, %rbx
        jne 3f
        cmpq $0x5678, (%rsp)
        je 1b
    3:  movl $60, %eax
        movl $1, %edi
        syscall
    """)
    subprocess.run(["gcc", "-nostdlib", "-static", "-o", binary, code], check=True)
    with subprocess.Popen(
        [binary], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as it:
        try:
            wait_until(lambda: os.readlink(f"/proc/{it.pid}/exe") == str(binary), "it runs")
            for _ in range(20):
                freeze_and_let_go(it.pid)
            assert it.poll() is None
        finally:
            it.kill()


SOMEWHERE_ELSE = """
#include <ucontext.h>
static ucontext_t elsewhere;
static void wait_there(void) { say("ready\\n", 0, 0, 0); for (;;) pause(); }
int main(int c, char **v)
{
    (void)c;
    words = v;
    getcontext(&elsewhere);
    /* A page is all the stack there is, and the page below is somebody's. */
    char *stack = mmap(0, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    elsewhere.uc_stack.ss_sp = stack + 4096;
    elsewhere.uc_stack.ss_size = 2 * 4096;
    makecontext(&elsewhere, wait_there, 0);
    setcontext(&elsewhere);
}
"""


def test_a_thread_whose_stack_is_small_and_elsewhere(tmp_path: Path) -> None:
    """As in Go: not one byte of its memory is used."""
    with tracee(SOMEWHERE_ELSE, tmp_path) as it, frozen_tree(it.pid) as tree:
        areas = [stopped.state.rseq for stopped in tree.tasks[it.pid].stopped]
        before = writable_memory(it.pid, areas)
        with dumped(tree):
            pass
        assert writable_memory(it.pid, areas) == before


def writable_memory(pid: int, areas: Sequence[Rseq | None]) -> dict[int, bytes]:
    """All but the rseq areas, into which the kernel writes the CPU whenever a thread runs on another one."""
    with ptrace.memory(pid) as memory:
        maps = proc.maps(proc.read(pid, "maps"))
        found = {
            m.start: bytearray(memory.read(m.start, m.end - m.start))
            for m in maps
            if m.perms.startswith("rw")
        }
    for area in areas:
        for start, content in found.items():
            if area is not None and start <= area.addr < start + len(content):
                content[area.addr - start : area.addr - start + area.size] = bytes(area.size)
    return {start: bytes(content) for start, content in found.items()}


MANY = """
static void *wait_for_ever(void *a) { for (;;) pause(); return a; }
int main(int c, char **v)
{
    struct sigevent silent = { .sigev_notify = SIGEV_NONE };
    pthread_attr_t small;
    pthread_t thread;
    timer_t timer;
    (void)c;
    words = v;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 1 << 16);
    for (int i = 1; i < 1000; i++)
        if (pthread_create(&thread, &small, wait_for_ever, NULL)) return 1;
    for (int i = 0; i < 1000; i++)
        if (timer_create(CLOCK_MONOTONIC, &silent, &timer)) return 1;
    say("ready\\n", 0, 0, 0);
    for (;;) pause();
}
"""


def test_a_thousand_threads_and_timers(tmp_path: Path) -> None:
    """All are asked at the same time, and all of that lies in the process."""
    with tracee(MANY, tmp_path) as it, frozen_tree(it.pid) as tree, dumped(tree) as dump:
        (task,) = dump.checkpoint.tasks
        assert len(task.threads) == 1000
        assert len(task.posix_timers) == 1000


def test_nothing_is_left_in_the_address_space(tmp_path: Path) -> None:
    with running("steady", directory=tmp_path) as program:
        before = proc.read(program.pid, "maps")
        with frozen_tree(program.pid) as tree:
            code = executable_memory(program.pid)
            with dumped(tree):
                assert proc.read(program.pid, "maps") == before
            assert executable_memory(program.pid) == code
        program.stop_and_verify()


def executable_memory(pid: int) -> dict[int, bytes]:
    with ptrace.memory(pid) as memory:
        maps = proc.maps(proc.read(pid, "maps"))
        return {
            m.start: memory.read(m.start, m.end - m.start)
            for m in maps
            if "x" in m.perms and m.path != "[vsyscall]"
        }
