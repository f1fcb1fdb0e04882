"""Freezing trees that resist: what is stopped is all of it, what cannot be stopped is said, and nobody is harmed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lazyproc import LazyRegion
from lazyproc.dump.explain import explain
from lazyproc.dump.freeze import FrozenTask, FrozenTree, _pidfd_of, _seize, frozen_tree, not_whole
from lazyproc.dump.walk import tree_of
from lazyproc.errors import LazyprocError, NoSuchProcess, PermissionDenied, TraceeError
from lazyproc.kernel import proc
from lazyproc.kernel.cgroup import hierarchies
from lazyproc.kernel.tracee import Tracee
from lazyproc.kernel.visit import call_in
from tests.forked import become_nobody, in_child
from tests.live.programs import running, wait_until
from tests.live.test_cgroups import group
from tests.live.tracees import freeze_and_let_go, frozen_and_dumped, state_of, tracee
from tests.needs import lacking

PLAIN = 'int main(int c, char **v) { (void)c; words = v; say("ready\\n", 0, 0, 0); for (;;) pause(); }'


def tracer_of(pid: int) -> int:
    return proc.status(proc.read(pid, "status")).tracer_pid


# --- words ------------------------------------------------------------------------------------------------------


def words_of(pid: int) -> str:
    with pytest.raises(LazyprocError) as caught, frozen_tree(pid, timeout_ms=100):
        pytest.fail("was frozen")
    return str(caught.value)


def test_no_such_pid() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(NoSuchProcess), frozen_tree(child.pid):
        pass
    assert (
        words_of(child.pid) == f"/proc/{child.pid}/stat: it is gone; check that the process is still running"
    )


def test_somebody_elses_process_may_not_be_traced(tmp_path: Path) -> None:
    with tracee(PLAIN, tmp_path) as it:

        def unprivileged() -> None:
            become_nobody()
            freeze_and_let_go(it.pid)

        with pytest.raises(PermissionDenied) as caught:
            in_child(unprivileged)
        words = f"thread {it.pid}: may not be traced; run as root, or as its owner with CAP_SYS_PTRACE"
        assert str(caught.value) == words


def test_a_traced_process_names_its_tracer(tmp_path: Path) -> None:
    with tracee(PLAIN, tmp_path) as it:
        seize = f"from lazyproc.kernel.tracee import Tracee\nTracee({it.pid}).seize()"
        code = f"import sys\n{seize}\nprint(flush=True)\nsys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": ":".join(sys.path)},
        ) as tracer:
            assert tracer.stdout is not None
            tracer.stdout.readline()
            assert words_of(it.pid) == (
                f"thread {it.pid}: is traced by pid {tracer.pid} already; detach that one first: see ps {tracer.pid}"
            )
            assert tracer.stdin is not None
            tracer.stdin.close()
        freeze_and_let_go(it.pid)


def test_a_process_whose_first_thread_has_ended_is_refused(tmp_path: Path) -> None:
    source = """
    static void *stay(void *a) { say("ready\\n", 0, 0, 0); for (;;) pause(); return a; }
    int main(int c, char **v) { pthread_t t; (void)c; words = v; pthread_create(&t, 0, stay, 0); pthread_exit(0); }
    """
    with tracee(source, tmp_path) as it:
        wait_until(lambda: state_of(it.pid) == "Z", "the first thread ends")
        assert "its first thread has ended and others run on" in words_of(it.pid)


VFORK = """
int main(int c, char **v)
{
    int how;
    (void)c;
    words = v;
    pid_t child = vfork();
    if (child == 0) {
        say("%ld\\n", getpid(), 0, 0);
        execl("/bin/cat", "cat", v[2], NULL);
        _exit(1);
    }
    waitpid(child, &how, 0);
    say("waited %ld\\n", how, 0, 0);
    for (;;) pause();
}
"""


def test_a_vfork_parent_is_awaited(tmp_path: Path) -> None:
    """Its child is about to execute a program, which ends the wait."""
    fifo = tmp_path / "input"
    os.mkfifo(fifo)
    with tracee(VFORK, tmp_path, str(fifo)) as it:
        freeze_and_let_go_of_both(it.pid)
        fifo.write_text("")
        assert it.hear() == "waited 0"


def freeze_and_let_go_of_both(pid: int) -> None:
    with frozen_tree(pid) as tree:
        assert len(tree.tasks) == 2


STUCK = """
int main(int c, char **v)
{
    (void)c;
    words = v;
    pid_t child = vfork();
    if (child == 0) {
        say("%ld\\n", getpid(), 0, 0);
        for (;;) { int fd = open(v[2], O_RDONLY); if (fd >= 0) _exit(0); }
    }
    say("returned\\n", 0, 0, 0);
    for (;;) pause();
}
"""


def test_uninterruptible_sleep_is_found_before_anything_is_stopped(tmp_path: Path) -> None:
    """A vfork parent sleeps in D state until its child lets go of it."""
    fifo = tmp_path / "input"
    os.mkfifo(fifo)
    with tracee(STUCK, tmp_path, str(fifo)) as it:
        wait_until(lambda: state_of(it.pid) == "D", "the parent waits")
        began = time.monotonic()
        words = words_of(it.pid)
        assert time.monotonic() - began < 1
        (child,) = proc.children_of(it.pid, it.pid)
        assert f"thread {it.pid} of pid {it.pid}: cannot be stopped within 100 ms: it waits" in words
        assert f"until process {child} calls exec or ends, which it has made by vfork(2)" in words
        assert "try again when it is over" in words
        assert [tracer_of(pid) for pid in tree_of(it.pid)] == [0, 0]
        fifo.write_text("")
        assert it.hear() == "returned"
        freeze_and_let_go(it.pid)


SLOW_READER = """
#include <sys/uio.h>

int main(int c, char **v)
{
    (void)c;
    words = v;
    static char page[4096];
    say("ready\\n", 0, 0, 0);
    for (char *from = (char *)strtoul(v[3], 0, 0);; from += sizeof(page)) {
        struct iovec near = { page, sizeof(page) }, far = { from, sizeof(page) };
        if (process_vm_readv(atoi(v[2]), &near, 1, &far, 1, 0) < 0) return 1;
    }
}
"""


@contextmanager
def slow_reader(place: Path, seconds: float) -> Iterator[int]:
    """A process that sleeps in state D nearly always, each time for so long: it reads memory of ours that comes slowly,
    and a fault in the memory of another process is not interruptible (faultin_page, mm/gup.c).
    """

    def slowly(_offset: int, length: int) -> bytes:
        time.sleep(seconds)
        return bytes(length)

    with LazyRegion(64 << 20, slowly) as memory:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with tracee(SLOW_READER, place, str(os.getpid()), hex(start)) as it:
            wait_until(lambda: state_of(it.pid) == "D", "it waits for a page")
            yield it.pid


def test_who_sleeps_uninterruptibly_again_and_again_is_not_stuck(tmp_path: Path) -> None:
    with slow_reader(tmp_path, 0.3) as pid:
        assert explain(pid) == ()
        for _ in range(3):
            freeze_and_let_go(pid)


BUSY = """
static void *spin(void *x) { for (;;) ; return x; }

int main(int c, char **v)
{
    (void)c;
    words = v;
    pthread_t other;
    pthread_create(&other, 0, spin, 0);
    say("ready\\n", 0, 0, 0);
    spin(0);
}
"""


@contextmanager
def rationed(pid: int, period_us: int) -> Iterator[None]:
    """A process that gets ten milliseconds of each period."""
    with ExitStack() as stack:
        for each in hierarchies():
            folder = stack.enter_context(group(Path(each.point, f"lazyproc-rationed-{os.getpid()}")))
            stack.callback(os.kill, pid, signal.SIGKILL)  # before its group goes
            if (folder / "cpu.cfs_quota_us").exists():
                (folder / "cpu.cfs_period_us").write_text(f"{period_us}")
                (folder / "cpu.cfs_quota_us").write_text("10000")
            elif (folder / "cpu.max").exists():
                (folder / "cpu.max").write_text(f"10000 {period_us}")
            else:
                continue
            (folder / "cgroup.procs").write_text(str(pid))
            yield
            return
    lacking("no cpu controller of cgroups can be used", "mount -t cgroup -o cpu cpu /sys/fs/cgroup/cpu")


def is_starved(pid: int) -> bool:
    """Whether a process that spins has not come to run for some ticks of the clock."""

    def ran() -> list[bytes]:
        return [proc.read(pid, f"task/{tid}/schedstat").split()[0] for tid in proc.task_ids(pid)]

    before = ran()
    time.sleep(0.02)
    return ran() == before


def test_a_thread_that_gets_no_processor_is_waited_for_longer(tmp_path: Path) -> None:
    """As in a container whose quota is used up: it is on its way, and stops as soon as it is let run."""
    with tracee(BUSY, tmp_path) as it, rationed(it.pid, 1_000_000):

        def freeze() -> int:
            with frozen_tree(it.pid, timeout_ms=300) as tree:
                return len(tree.tasks[it.pid].threads)

        for _ in range(3):
            wait_until(lambda: is_starved(it.pid), "its quota is used up")
            with ThreadPoolExecutor(1) as thread:  # whose end lets all go
                assert thread.submit(freeze).result() == 2


def test_a_tree_that_cannot_be_stopped_whole_says_what_keeps_it() -> None:
    """A process that is about to have another program has no thread for a moment; that is no growth."""
    task = FrozenTask(12)
    task.stat = proc.stat(proc.read(os.getpid(), "stat"))
    assert "pid 12: is executing a program, or ending" in str(not_whole(FrozenTree({12: task}), 12))
    task.threads.append(Tracee(12))
    assert "pid 12: its tree grows faster" in str(not_whole(FrozenTree({12: task}), 12))


# --- moving targets ---------------------------------------------------------------------------------------------


def test_a_tree_that_grows_is_stopped_whole(tmp_path: Path) -> None:
    source = """
    int main(int c, char **v)
    {
        (void)c;
        words = v;
        for (int i = 0; i < 3; i++) if (fork() == 0) break;
        if (getppid() == atoi(v[2])) say("ready\\n", 0, 0, 0);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;) {
            pid_t child = fork();
            if (child == 0) { usleep(500); _exit(0); }
            if (waitpid(child, 0, 0) != child) _exit(3);
        }
    }
    """
    with tracee(source, tmp_path, str(os.getpid())) as it:
        for _ in range(20):
            with frozen_tree(it.pid) as tree:
                alive = {task.pid for task in tree.tasks.values() if not task.zombie}
                assert len(alive) >= 4
                assert {pid for pid in tree_of(it.pid) if state_of(pid) != "Z"} == alive
                assert {state_of(pid) for pid in alive} == {"t"}
        with frozen_tree(it.pid) as tree:
            tree.kill()


def test_threads_that_come_and_go_are_all_stopped(tmp_path: Path) -> None:
    source = """
    static void *brief(void *a) { usleep(50); return a; }
    int main(int c, char **v)
    {
        (void)c;
        words = v;
        say("ready\\n", 0, 0, 0);
        for (;;) {
            pthread_t t[4];
            for (int i = 0; i < 4; i++) if (pthread_create(&t[i], 0, brief, 0)) _exit(1);
            for (int i = 0; i < 4; i++) pthread_join(t[i], 0);
        }
    }
    """
    with tracee(source, tmp_path) as it:
        for _ in range(50):
            with frozen_tree(it.pid) as tree:
                tids = set(proc.task_ids(it.pid))
                known = {thread.tid for thread in tree.tasks[it.pid].threads}
                exiting = {
                    tid
                    for tid in tids - known
                    if proc.stat(proc.read(it.pid, f"task/{tid}/stat")).state in "ZX"
                }
                assert tids - exiting == known
        assert it.process.poll() is None


@pytest.mark.parametrize("whose", ["root", "child"])
def test_exec_by_any_thread_during_the_freeze(whose: str, tmp_path: Path) -> None:
    source = """
    static void *again(void *a) { execv("/proc/self/exe", words); _exit(2); return a; }
    int main(int c, char **v)
    {
        pthread_t t;
        words = v;
        if (c == 3) {
            int child = v[2][0] == 'c' ? fork() : 0;
            if (child || v[2][0] == 'r') say("ready\\n", 0, 0, 0);
            words = (char *[]){ v[0], v[1], "again", "again", 0 };
            while (child) pause();
        }
        if (pthread_create(&t, 0, again, 0)) _exit(1);
        for (;;) pause();
    }
    """
    with tracee(source, tmp_path, whose) as it:
        for _ in range(40):
            with frozen_tree(it.pid) as tree:
                assert len(tree.tasks) == (1 if whose == "root" else 2)
                for pid, task in tree.tasks.items():
                    assert task.threads[0].tid == pid
                    assert state_of(pid) == "t"
        assert it.process.poll() is None
        with frozen_tree(it.pid) as tree:
            tree.kill()


# --- stopped and killed -----------------------------------------------------------------------------------------


def test_a_process_that_signals_rain_on(tmp_path: Path) -> None:
    """The stop of a signal takes a pending interrupt away; there is always another signal."""
    source = """
    static volatile long rained;
    static void count(int s) { (void)s; rained++; }
    int main(int c, char **v)
    {
        struct sigaction action = {.sa_handler = count};
        struct itimerspec often = {{0, 20000}, {0, 20000}};
        timer_t timer;

        (void)c;
        words = v;
        sigaction(SIGALRM, &action, 0);
        timer_create(CLOCK_MONOTONIC, 0, &timer);
        timer_settime(timer, 0, &often, 0);
        while (rained < 100) pause();
        say("ready\\n", 0, 0, 0);
        for (;;) pause();
    }
    """
    with tracee(source, tmp_path) as it:
        for _ in range(3000):
            call_in(it.pid, "gettid")
        for _ in range(100):
            with frozen_tree(it.pid):
                assert state_of(it.pid) == "t"
        assert it.process.poll() is None


def test_a_stopped_process_stays_stopped(tmp_path: Path) -> None:
    with tracee(PLAIN, tmp_path) as it:
        os.kill(it.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, it.pid, os.WSTOPPED)
        with frozen_and_dumped(it.pid) as tree:
            assert tree.tasks[it.pid].threads[0].stop_signal == signal.SIGSTOP
        wait_until(lambda: state_of(it.pid) == "T", "it is stopped again")
        os.kill(it.pid, signal.SIGCONT)
        wait_until(lambda: state_of(it.pid) == "S", "it goes on")


def test_killed_while_frozen_a_tree_is_gone(tmp_path: Path) -> None:
    """The leader is reaped although threads were traced."""
    with running("threads", directory=tmp_path) as program:
        with frozen_tree(program.pid) as tree:
            tree.kill()
        assert not Path(f"/proc/{program.pid}").exists()


def test_a_freeze_belongs_to_the_thread_that_made_it(tmp_path: Path) -> None:
    """A tracing thread that ends lets everything go."""
    with tracee(PLAIN, tmp_path) as it:
        context = frozen_tree(it.pid)
        thread = threading.Thread(target=context.__enter__)
        thread.start()
        thread.join()
        wait_until(lambda: tracer_of(it.pid) == 0, "nobody traces it")
        freeze_and_let_go(it.pid)


def test_an_error_while_frozen_lets_it_go(tmp_path: Path) -> None:
    with tracee(PLAIN, tmp_path) as it:
        with pytest.raises(TraceeError), frozen_tree(it.pid):
            raise TraceeError("of the test")
        assert tracer_of(it.pid) == 0


def test_what_a_thread_of_ours_has_seized_is_its_own(tmp_path: Path) -> None:
    """Whichever thread: the kernel names that, not its process."""
    with tracee(PLAIN, tmp_path) as it, ThreadPoolExecutor(1) as other:
        task = FrozenTask(it.pid)
        other.submit(_seize, task, Tracee(it.pid)).result()
        other.submit(_seize, task, Tracee(it.pid)).result()
        with pytest.raises(PermissionDenied, match="is traced by"):
            _seize(task, Tracee(it.pid))


def test_a_thread_that_may_not_be_traced_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    source = """
    static void *stay(void *a) { say("ready\\n", 0, 0, 0); for (;;) pause(); return a; }
    int main(int c, char **v)
    {
        pthread_t t;
        (void)c;
        words = v;
        if (pthread_create(&t, 0, stay, 0)) _exit(1);
        for (;;) pause();
    }
    """
    with tracee(source, tmp_path) as it, ThreadPoolExecutor(1) as other:
        (second,) = (tid for tid in proc.task_ids(it.pid) if tid != it.pid)
        other.submit(Tracee(second).seize).result()
        assert f"thread {second}: is traced by" in words_of(it.pid)
        assert tracer_of(it.pid) == 0
        wait_until(lambda: state_of(it.pid) == "S", "it goes on")


def test_who_is_frozen_already_is_not_frozen_once_more(tmp_path: Path) -> None:
    with tracee(PLAIN, tmp_path) as it, frozen_tree(it.pid):
        with pytest.raises(PermissionDenied, match=f"is traced by pid {os.getpid()} already"):
            freeze_and_let_go(it.pid)
        assert state_of(it.pid) == "t"


def test_what_was_opened_for_a_freeze_is_closed(tmp_path: Path) -> None:
    with tracee(PLAIN, tmp_path) as it:
        freeze_and_let_go(it.pid)  # which may open something for good
        before = os.listdir("/proc/self/fd")
        freeze_and_let_go(it.pid)
        assert os.listdir("/proc/self/fd") == before


def test_who_is_gone_as_soon_as_it_ends_is_named() -> None:
    """A child between two looks at it, whose parent ignores SIGCHLD."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(NoSuchProcess, match=f"pid {child.pid}: has ended"):
        _pidfd_of(child.pid)
