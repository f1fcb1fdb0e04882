"""A frozen process rebuilt in a new pid namespace runs on: its registers and sleeps, its signals, its numbers."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazyproc.dump.before import observed_sleeps
from lazyproc.dump.freeze import frozen_tree
from lazyproc.dump.gather import dumped
from lazyproc.dump.source import dump_pages
from lazyproc.errors import TraceeError
from lazyproc.events import ignore
from lazyproc.facts import replace
from lazyproc.images.xsave import relaid
from lazyproc.kernel import proc, xfeatures
from lazyproc.kernel.remote import ENDINGS
from lazyproc.kernel.sys import ioprio_get, ioprio_set, scheduling
from lazyproc.model import Checkpoint, Scheduling
from lazyproc.restore.tree import built_tree
from tests.live.programs import UNSUPPORTED, running, wait_until
from tests.live.tracees import tracee

PROGRAMS = ("steady", "rseq_loop", "fpu_amx", "fpu_amx_later", "signals", "sleeps", "threads", "timers")


@contextmanager
def moved(
    pid: int, sig: int = 0, *, changed: Callable[[Checkpoint], Checkpoint] = lambda checkpoint: checkpoint
) -> Iterator[tuple[int, int]]:
    """The process is rebuilt, and killed where it was: the pids of the copy and of its parent, which exits as it does.

    `sig` is sent to it while it is frozen; what is rebuilt is `changed`.
    """
    with (
        frozen_tree(pid, asleep=observed_sleeps(pid)) as tree,
        _signalled(pid, sig),
        dumped(tree) as dump,
        dump_pages(dump) as pages,
        built_tree(changed(dump.whole()), pages, ignore, pager=None, pidns="new") as built,
    ):
        root, parent = built.root_pid, built.nursery.pid
        tree.kill()
        built.release()
    try:
        yield root, parent
    finally:
        try:
            os.kill(parent, signal.SIGKILL)
            os.waitpid(parent, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@contextmanager
def _signalled(pid: int, sig: int) -> Iterator[None]:
    os.kill(pid, sig)
    yield


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_goes_on_without_one_wrong_check(name: str, tmp_path: Path) -> None:
    with running(name, directory=tmp_path) as program:
        if program.process.poll() == UNSUPPORTED:
            pytest.skip(f"this machine lacks what {name} checks")
        program.watch.wait_beats(1)
        with moved(program.pid) as (root, parent):
            program.watch.wait_beats(2)
            os.kill(root, signal.SIGTERM)
            assert os.waitpid(parent, 0)[1] == 0
            program.watch.wait_ended()


def threads_go_on(changed: Callable[[Checkpoint], Checkpoint], directory: Path) -> None:
    with running("threads", "16", directory=directory) as program:
        program.watch.wait_beats(1)
        with moved(program.pid, changed=changed) as (root, parent):
            program.watch.wait_beats(2)
            os.kill(root, signal.SIGTERM)
            assert os.waitpid(parent, 0)[1] == 0
            program.watch.wait_ended()


def _of_fewer_components(area: bytes) -> bytes:
    """Without what Intel has behind the AVX-512 registers: protection keys, tiles."""
    if len(area) <= AVX512_END:
        pytest.skip("this processor has nothing behind its AVX-512 registers")
    return _enabling(area, (1 << 9) - 1)[:AVX512_END]


def _of_the_other_maker(area: bytes) -> bytes:
    if AVX512 & ~int.from_bytes(area[XCR0 : XCR0 + 8], "little"):
        pytest.skip("this processor has no AVX-512, before which AMD leaves no gap")
    other = INTEL if xfeatures.offsets()[5] == AMD[5] else AMD
    return relaid(_enabling(area, sum(1 << bit for bit in other) | 3), other)


def _enabling(area: bytes, mask: int) -> bytes:
    enabled = int.from_bytes(area[XCR0 : XCR0 + 8], "little") & mask
    return area[:XCR0] + enabled.to_bytes(8, "little") + area[XCR0 + 8 :]


XCR0, AVX512, AVX512_END = 464, 0b111 << 5, 2688  # the end: in an xsave area of Intel's
INTEL = {2: 576, 5: 1088, 6: 1152, 7: 1664, 9: 2688}  # CPUID leaf 0xD
AMD = {2: 576, 5: 832, 6: 896, 7: 1408, 9: 2432}


@pytest.mark.parametrize("changed", [_of_fewer_components, _of_the_other_maker])
def test_vector_state_of_another_processor(changed: Callable[[bytes], bytes], tmp_path: Path) -> None:
    def there(checkpoint: Checkpoint) -> Checkpoint:
        (task,) = checkpoint.tasks
        threads = tuple(replace(thread, xsave=changed(thread.xsave)) for thread in task.threads)
        return replace(checkpoint, tasks=(replace(task, threads=threads),))

    threads_go_on(there, tmp_path)


def test_no_thread_loses_the_end_of_its_program_to_a_signal_action(tmp_path: Path) -> None:
    """Setting an action that ignores the signal discards it where it is pending, in any thread."""

    def again_and_again(checkpoint: Checkpoint) -> Checkpoint:
        (task,) = checkpoint.tasks
        action = next(action for action in task.sigactions if action.signal == ENDINGS[0])
        return replace(checkpoint, tasks=(replace(task, sigactions=(*task.sigactions, *[action] * 1000)),))

    threads_go_on(again_and_again, tmp_path)


SLEEPERS = """
#include <linux/futex.h>
#include <poll.h>
#include <sys/select.h>
enum { MS = 1500 };
/* One and a half seconds each. */
static long kind_nanosleep(void) { struct timespec t = { 1, 500000000 }; return nanosleep(&t, NULL); }
static long kind_nanosleep_rem(void) { struct timespec t = { 1, 500000000 }; return nanosleep(&t, &t); }
static long kind_clock(void) { struct timespec t = { 1, 500000000 }; return clock_nanosleep(1, 0, &t, NULL); }
static long kind_poll(void) { return poll(NULL, 0, MS); }
static long kind_futex(void)
{
    static int word;
    struct timespec t = { 1, 500000000 };
    return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0) == -1 && errno == ETIMEDOUT ? 0 : -1;
}
static long kind_epoll(void) { struct epoll_event e; return epoll_wait(epoll_create1(0), &e, 1, MS); }
static long kind_select(void) { struct timeval t = { 1, 500000 }; return select(0, NULL, NULL, NULL, &t); }
static long (*const kinds[])(void) = { kind_nanosleep, kind_nanosleep_rem, kind_clock, kind_poll, kind_futex,
                                       kind_epoll, kind_select };
enum { KINDS = sizeof kinds / sizeof *kinds };
static long got[KINDS], took[KINDS];
static void *sleeper(void *a)
{
    long kind = (long)a, began = now_ms();
    got[kind] = kinds[kind]();
    took[kind] = now_ms() - began;
    return NULL;
}
int main(int c, char **v)
{
    pthread_t threads[KINDS];
    (void)c;
    words = v;
    for (long k = 0; k < KINDS; k++) pthread_create(&threads[k], NULL, sleeper, (void *)k);
    say("ready\\n", 0, 0, 0);
    for (long k = 0; k < KINDS; k++) pthread_join(threads[k], NULL);
    for (long k = 0; k < KINDS; k++) say("%ld %ld %ld\\n", k, got[k], took[k]);
}
"""
KINDS = 7
SLEEP_MS, FROZEN_AT_MS, LATE_MS = 1500, 900, 350  # a sleep that starts anew lasts 2400


def test_every_kind_of_sleep_ends_on_time_in_the_copy(tmp_path: Path) -> None:
    with tracee(SLEEPERS, tmp_path) as it:
        wait_until(lambda: _age_ms(it.pid) >= FROZEN_AT_MS, "the sleeps have begun long ago")
        with moved(it.pid):
            lines: list[str] = []
            while len(lines) < KINDS:
                lines += it.hear().splitlines()
            for kind, line in enumerate(lines):
                number, got, took = map(int, line.split())
                assert (number, got) == (kind, 0)
                assert took + 1 >= SLEEP_MS, f"sleep {kind} was too short: {took} ms"
                assert took < SLEEP_MS + LATE_MS, f"sleep {kind} was too long: {took} ms"


def _age_ms(pid: int) -> float:
    """Since the process was started, to a clock tick of 10 ms."""
    started = proc.stat(proc.read(pid, "stat")).start_time / os.sysconf("SC_CLK_TCK")
    return (time.clock_gettime(time.CLOCK_BOOTTIME) - started) * 1000


PAUSING = """
static volatile long flag;
static void on_usr1(int s) { (void)s; flag = 1; }
int main(int c, char **v)
{
    struct sigaction action = { .sa_handler = on_usr1, .sa_flags = SA_RESTART };
    (void)c;
    words = v;
    sigaction(SIGUSR1, &action, NULL);
    say("ready\\n", 0, 0, 0);
    long got = pause();
    say("%ld %ld %ld\\n", got, errno, flag);
}
"""


def test_a_signal_that_came_during_the_freeze_ends_a_pause_in_the_copy(tmp_path: Path) -> None:
    """Made again after the handler, pause(2) would wait for ever."""
    with tracee(PAUSING, tmp_path) as it:
        wait_until(lambda: _in_call(it.pid, 34), "pause")
        with moved(it.pid, signal.SIGUSR1) as (_, parent):
            assert it.hear() == "-1 4 1"
            os.waitpid(parent, 0)


def _in_call(pid: int, nr: int) -> bool:
    call = proc.syscall(proc.read(pid, "syscall"))
    return call is not None and call.nr == nr


STOPPED_CHILD = """
static void on_segv(int s) { (void)s; _exit(7); }
int main(int c, char **v)
{
    struct sigaction caught = { .sa_handler = on_segv }, deaf = { .sa_handler = SIG_DFL, .sa_flags = SA_NOCLDSTOP };
    (void)c;
    words = v;
    if (strcmp(v[2], "ignored") == 0) { deaf.sa_handler = SIG_IGN; deaf.sa_flags = 0; }
    sigaction(SIGSEGV, &caught, NULL);
    sigaction(SIGCHLD, &deaf, NULL);
    pid_t child = fork();
    if (child == 0) { prctl(PR_SET_PDEATHSIG, SIGKILL); raise(SIGSTOP); _exit(0); }
    waitpid(child, NULL, WUNTRACED);
    say("ready\\n", 0, 0, 0);
    for (;;) pause();
}
"""


TIMER_OF_NOBODY = """
static timer_t timer;
static void *owner(void *a)
{
    struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGUSR1 };
    struct itimerspec often = { { 0, 50000000 }, { 0, 50000000 } };
    event._sigev_un._tid = syscall(SYS_gettid);
    return timer_create(CLOCK_MONOTONIC, &event, &timer) || timer_settime(timer, 0, &often, NULL) ? words : a;
}
int main(int c, char **v)
{
    struct itimerspec left;
    pthread_t thread;
    void *failed;
    (void)c;
    words = v;
    pthread_create(&thread, NULL, owner, NULL);
    pthread_join(thread, &failed);
    if (failed) return 1;
    say("ready\\n", 0, 0, 0);
    while (access(v[2], F_OK)) usleep(1000);
    long got = timer_gettime(timer, &left);
    say("%ld %ld\\n", got, left.it_interval.tv_nsec, 0);
}
"""


def test_a_timer_outlives_the_thread_that_it_signals(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with tracee(TIMER_OF_NOBODY, tmp_path, str(gate)) as it:
        wait_until(lambda: len(proc.task_ids(it.pid)) == 1, "the thread has ended")
        with moved(it.pid):
            gate.touch()
            assert it.hear() == "0 50000000"


MANY = """
int main(int c, char **v)
{
    struct sigevent silent = { .sigev_notify = SIGEV_NONE };
    union sigval value = { .sival_int = 5 };
    sigset_t blocked;
    timer_t timer;
    long left = 0;
    (void)c;
    words = v;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGRTMIN);
    sigprocmask(SIG_BLOCK, &blocked, NULL);
    for (int i = 0; i < 2000; i++)
        if (timer_create(CLOCK_MONOTONIC, &silent, &timer) || sigqueue(getpid(), SIGRTMIN, value)) return 1;
    say("ready\\n", 0, 0, 0);
    while (access(v[2], F_OK)) usleep(1000);
    while (sigtimedwait(&blocked, NULL, &(struct timespec){ 0, 0 }) == SIGRTMIN) left++;
    say("%ld\\n", left, 0, 0);
}
"""


def test_thousands_of_timers_and_pending_signals(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with tracee(MANY, tmp_path, str(gate)) as it, moved(it.pid):
        gate.touch()
        assert it.hear() == "2000"


NO_ROOM = """
#include <sys/resource.h>
int main(int c, char **v)
{
    struct rlimit none = { 0, 0 };
    union sigval value = { .sival_int = 5 };
    sigset_t all, now;
    (void)c;
    words = v;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    setrlimit(RLIMIT_SIGPENDING, &none);
    pthread_kill(pthread_self(), SIGUSR1);
    sigqueue(getpid(), SIGUSR2, value);
    kill(getpid(), SIGRTMIN);
    say("ready\\n", 0, 0, 0);
    while (access(v[2], F_OK)) usleep(1000);
    sigpending(&now);
    say("%ld %ld %ld\\n", sigismember(&now, SIGUSR1), sigismember(&now, SIGUSR2), sigismember(&now, SIGRTMIN));
}
"""


def test_signals_for_which_the_queue_had_no_room(tmp_path: Path) -> None:
    """Nor has it for the signal that ends a program of ours."""
    gate = tmp_path / "gate"
    with tracee(NO_ROOM, tmp_path, str(gate)) as it, moved(it.pid):
        gate.touch()
        assert it.hear() == "1 1 1"


@pytest.mark.parametrize("child", ["ignored", "no stops"])
def test_a_parent_that_does_not_hear_of_stops_keeps_its_actions(child: str, tmp_path: Path) -> None:
    """It gets no SIGCHLD when its child is stopped again, and waiting for one it would run into its own SIGSEGV."""
    with tracee(STOPPED_CHILD, tmp_path, child) as it, moved(it.pid) as (root, parent):
        os.kill(root, signal.SIGSEGV)
        assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 7


TIMER_OF_A_THREAD = """
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif
static timer_t timer;
static volatile sig_atomic_t asked;
static void on_usr1(int s) { (void)s; asked = 1; }
static void on_timer(int s) { (void)s; if (asked) { asked = 0; say("fired\\n", 0, 0, 0); } }
static void *of_thread(void *clock)
{
    struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGPROF };
    struct itimerspec times = { { 0, 10000000 }, { 0, 10000000 } };
    event.sigev_notify_thread_id = gettid();
    if (timer_create((clockid_t)(long)clock, &event, &timer) || timer_settime(timer, 0, &times, NULL)) _exit(1);
    while ((long)clock == CLOCK_THREAD_CPUTIME_ID) continue;
    return NULL;
}
int main(int c, char **v)
{
    long clock = strcmp(v[2], "busy") ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID;
    struct itimerspec times;
    pthread_t thread;
    (void)c;
    words = v;
    signal(SIGUSR1, on_usr1);
    signal(SIGPROF, on_timer);
    pthread_create(&thread, NULL, of_thread, (void *)clock);
    if (clock == CLOCK_MONOTONIC) pthread_join(thread, NULL);
    say("ready\\n", 0, 0, 0);
    do pause(); while (clock != CLOCK_MONOTONIC);
    long got = timer_gettime(timer, &times);
    say("%ld %ld\\n", got, times.it_interval.tv_nsec, 0);
    for (;;) pause();
}
"""


def test_a_timer_on_the_time_that_a_thread_uses_goes_by_that_thread(tmp_path: Path) -> None:
    """As a profiler has one in each thread: made by another thread it goes by the time of that one."""
    with tracee(TIMER_OF_A_THREAD, tmp_path, "busy") as it, moved(it.pid) as (root, _):
        os.kill(root, signal.SIGUSR1)
        assert it.hear() == "fired"


LOCKED = """
#include <sys/resource.h>
int main(int c, char **v)
{
    size_t size = 1 << 20;
    struct rlimit few = { 65536, 65536 };
    (void)c;
    words = v;
    char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mlock(at, size) || setrlimit(RLIMIT_MEMLOCK, &few)) return 1;
    say("ready\\n", 0, 0, 0);
    if (setresuid(65534, 65534, 65534)) return 1;
    for (;;) pause();
}
"""
NOBODY = 65534
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4


def test_memory_that_was_locked_before_its_user_changed_is_locked(tmp_path: Path) -> None:
    """More than he may lock himself."""
    with tracee(LOCKED, tmp_path) as it:
        wait_until(lambda: _status(it.pid).uid.effective == NOBODY, "it has become another user's")
        before = _status(it.pid).locked_kib
        with moved(it.pid) as (root, _):
            assert _status(root).uid.effective == NOBODY
            assert before == _status(root).locked_kib == 1024


LOCKING = """
int main(int c, char **v)
{
    sigset_t usr1;
    int asked;
    (void)c;
    words = v;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    sigprocmask(SIG_BLOCK, &usr1, NULL);
    if (mlockall(atoi(v[2]))) return 1;
    say("ready\\n", 0, 0, 0);
    sigwait(&usr1, &asked);
    char *at = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    say("%ld\\n", (long)at, 0, 0);
    for (;;) pause();
}
"""


@pytest.mark.parametrize(
    "flags", [MCL_CURRENT, MCL_FUTURE, MCL_CURRENT | MCL_FUTURE, MCL_FUTURE | MCL_ONFAULT]
)
def test_what_is_mapped_after_the_move_is_locked_as_before(flags: int, tmp_path: Path) -> None:
    with tracee(LOCKING, tmp_path, str(flags)) as it:
        before = _status(it.pid).locked_kib
        with moved(it.pid) as (root, _):
            assert _status(root).locked_kib == before
            os.kill(root, signal.SIGUSR1)
            at = int(it.hear())
            found = next(e for e in proc.smaps(proc.read(root, "smaps")) if e.entry.end > at)
            assert ("lo" in found.vm_flags, "lf" in found.vm_flags) == (
                bool(flags & MCL_FUTURE),
                bool(flags & MCL_ONFAULT),
            )


def test_a_call_that_fails_is_named(tmp_path: Path) -> None:
    """And not the descriptors that would have come after it."""

    def changed(checkpoint: Checkpoint) -> Checkpoint:
        (task,) = checkpoint.tasks
        assert task.mm is not None
        return replace(checkpoint, tasks=(replace(task, mm=replace(task.mm, brk=2**64 - 1)),))

    with tracee(LOCKING, tmp_path, "1") as it:
        with (
            pytest.raises(TraceeError, match=r"prctl\(.*\) failed: Invalid argument"),
            moved(it.pid, changed=changed),
        ):
            pass
        os.kill(it.pid, signal.SIGUSR1)
        assert int(it.hear())


WAITING = """
int main(int c, char **v)
{
    (void)c;
    words = v;
    say("ready\\n", 0, 0, 0);
    for (;;) pause();
}
"""
IDLE = 3 << 13  # ioprio_set(2)
PR_SET_THP_DISABLE = 41


@contextmanager
def _treated() -> Iterator[None]:
    """We are to run on one processor, read from disks when nobody else does, and have no huge pages."""
    cpus, priority, prctl = os.sched_getaffinity(0), ioprio_get(0), ctypes.CDLL(None).prctl
    try:
        os.sched_setaffinity(0, {min(cpus)})
        ioprio_set(0, IDLE)
        prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
        yield
    finally:
        os.sched_setaffinity(0, cpus)
        ioprio_set(0, priority)
        prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_how_the_restorer_is_treated_is_nothing_to_the_tree(tmp_path: Path) -> None:
    with tracee(WAITING, tmp_path) as it:
        before = _treatment(it.pid)
        with _treated(), moved(it.pid) as (root, _):
            assert _treatment(root) == before


def _treatment(pid: int) -> tuple[Scheduling, bytes]:
    huge = next(line for line in proc.read(pid, "status").splitlines() if line.startswith(b"THP_enabled"))
    return scheduling(pid, os.cpu_count() or 1), huge


def _status(pid: int) -> proc.Status:
    return proc.status(proc.read(pid, "status"))
