"""Obstacles of real processes: each is found and named before anything is stopped, with a way out."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import pty
import resource
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lazyproc.dump.explain import explain
from lazyproc.dump.freeze import frozen_tree
from lazyproc.dump.gather import dumped
from lazyproc.dump.permits import ALL
from lazyproc.dump.survey import survey
from lazyproc.errors import NoSuchProcess, Obstacle, PermissionDenied, TraceeError, UsageError
from lazyproc.events import Event, Note
from lazyproc.kernel import fds, proc
from lazyproc.kernel.family import daemon
from lazyproc.kernel.sys import syscall
from lazyproc.kernel.tracee import Tracee
from lazyproc.uffd.device import Feature, Userfaultfd
from tests.forked import become_nobody, in_child
from tests.live.descriptors import stopped
from tests.live.moving import CLI
from tests.live.programs import wait_until
from tests.needs import lacking, require, require_kernel_threads, require_root

SYS_RT_SIGPROCMASK, SIG_SETMASK = 14, 2
SYS_MUNMAP, SYS_CLONE, SYS_MSGGET, SYS_MSGSND, SYS_MSGCTL = 11, 56, 68, 69, 71
SYS_SEMGET, SYS_SEMOP, SYS_SEMCTL, SYS_SCHED_SETATTR = 64, 65, 66, 314
CLONE_FS, CLONE_NEWUTS, CLONE_NEWUSER, CLONE_NEWPID = 0x200, 0x4000000, 0x10000000, 0x20000000
MAP_NORESERVE, MAP_HUGETLB = 0x4000, 0x40000
LONG_NAME = "n" * 250
_kept: list[mmap.mmap] = []  # until the process ends
REPORT = 900  # of `stopped`: who keeps a copy of it keeps the test waiting


def found(*bodies: Callable[[], object]) -> list[Obstacle]:
    """What stands in the way of a chain of processes, each the child of the one before."""
    with stopped(*bodies) as tasks:
        return list(explain(tasks[0].pid))


def whys(obstacles: list[Obstacle]) -> list[str]:
    return [f"{o.where.split(' ')[0]}: {o.why}" for o in obstacles]


def unshare(flags: int) -> None:
    syscall(fds.SYS_UNSHARE, flags)


def test_a_plain_tree_has_no_obstacle() -> None:
    assert found(os.setsid, lambda: None) == []


def test_a_thread_that_blocks_every_signal_is_not_taken_for_a_parked_one() -> None:
    """Nor is what it may execute looked for beyond where a process can be read ([vsyscall])."""
    everything = ctypes.create_string_buffer(b"\xff" * 8)
    block = (SYS_RT_SIGPROCMASK, SIG_SETMASK, ctypes.addressof(everything), 0, 8)
    assert found(lambda: syscall(*block)) == []


@pytest.mark.parametrize("name", ["as", "data"])
def test_a_limit_that_leaves_no_room_for_our_calls(name: str) -> None:
    """With the room that is asked for it can be dumped, and with a page less it is refused before it is stopped."""
    require_root()
    which = {"as": resource.RLIMIT_AS, "data": resource.RLIMIT_DATA}[name]
    with stopped(lambda: None) as tasks:
        pid = tasks[0].pid
        resource.prlimit(pid, which, (0, resource.RLIM_INFINITY))
        (obstacle,) = explain(pid)
        assert f"(RLIMIT_{name.upper()}), and would need" in obstacle.why
        room = int(obstacle.remedy.removeprefix(f"give it room: prlimit --pid {pid} --{name}=").rstrip(":"))
        resource.prlimit(pid, which, (room - mmap.PAGESIZE, resource.RLIM_INFINITY))
        assert [each.remedy for each in explain(pid)] == [obstacle.remedy]
        with pytest.raises(TraceeError), frozen_tree(pid) as tree, dumped(tree):
            pass
        resource.prlimit(pid, which, (room, resource.RLIM_INFINITY))
        assert explain(pid) == ()
        with frozen_tree(pid) as tree, dumped(tree) as dump:
            assert dump.checkpoint.root.limits[which].soft == room


def test_what_is_looked_at_runs_on(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True, **_SILENT) as process:
        try:
            # What Popen waits for is closed before the new program is mapped (begin_new_exec, fs/exec.c).
            wait_until(lambda: b"[vdso]" in proc.read(process.pid, "maps"), "sleep(1) is mapped")
            assert explain(process.pid) == ()
            status = proc.status(proc.read(process.pid, "status"))
            assert status.tracer_pid == 0
            assert status.state in ("R", "S")  # it may not have come to its sleep yet
        finally:
            process.kill()


@pytest.mark.parametrize("where", [("cwd",), ("fd",), ("fd", "mapping")])
def test_a_path_that_the_kernel_does_not_tell(where: tuple[str, ...], tmp_path: Path) -> None:
    """/proc/PID/fd/N has a page for it."""

    def go_deep() -> None:
        os.chdir(tmp_path)
        for _ in range(mmap.PAGESIZE // len(LONG_NAME) + 1):
            os.mkdir(LONG_NAME)
            os.chdir(LONG_NAME)
        if "fd" in where:
            fd = os.open("file", os.O_RDWR | os.O_CREAT)
            os.write(fd, bytes(mmap.PAGESIZE))
            if "mapping" in where:
                _kept.append(mmap.mmap(fd, 0))  # which has a descriptor of its own
                os.close(fd)
            os.chdir("/")

    against = found(go_deep)
    assert sorted(each.where.split()[0] for each in against) == list(where)
    assert {each.why for each in against} == {"its path is longer than 4095 bytes"}


def test_a_leader_outside_is_a_note_and_no_obstacle() -> None:
    events: list[Event] = []
    with stopped(lambda: os.setsid(), lambda: None) as tasks:
        child = tasks[1].pid
        assert explain(child, listener=events.append) == ()
    assert [type(event) for event in events] == [Note, Note]
    assert f"pid {child}: the leader of its process group ({tasks[0].pid}) is not in the tree" in str(
        events[0]
    )


# --- who may not be asked ---------------------------------------------------------------------------------


def test_nobody_by_that_number() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
        with pytest.raises(
            NoSuchProcess, match=f"pid {process.pid}: there is no such process; check the number"
        ):
            explain(process.pid)


def test_a_threads_number_is_wrong_usage() -> None:
    ending, started = threading.Event(), threading.Event()

    def live() -> None:
        started.set()
        ending.wait()

    thread = threading.Thread(target=live)
    thread.start()
    started.wait()
    try:
        with pytest.raises(UsageError, match=f"is a thread; name its process, {os.getpid()}"):
            explain(thread.native_id or 0)
    finally:
        ending.set()
        thread.join()


def test_somebody_elses_process_is_refused_with_both_uids() -> None:
    require_root()
    with stopped(os.setsid) as tasks:

        def unprivileged() -> None:
            become_nobody()
            explain(tasks[0].pid)

        words = "belongs to uid 0 and may not be traced by uid 65534"
        with pytest.raises(PermissionDenied, match=words):
            in_child(unprivileged)


def test_the_capability_alone_is_not_the_right() -> None:
    """In a user namespace of its own a process has it, and may trace nobody outside."""
    require_root()
    with stopped(os.setsid) as tasks:

        def apart() -> None:
            unshare(CLONE_NEWUSER)
            explain(tasks[0].pid)

        with pytest.raises(
            PermissionDenied, match=r"CAP_SYS_PTRACE or not; .* the user namespace of the process"
        ):
            in_child(apart)


def test_the_number_that_a_process_has_in_a_container() -> None:
    require_root()
    most = int(Path("/proc/sys/kernel/pid_max").read_text())
    number = next(each for each in range(most - 1, 2, -1) if not Path(f"/proc/{each}").exists())
    within = f"echo {number - 1} > /proc/sys/kernel/ns_last_pid; sleep 60 & wait"
    command = ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", within]
    with subprocess.Popen(command, start_new_session=True, **_SILENT) as container:
        try:
            wait_until(lambda: len(survey(container.pid).processes) == 3, "three processes")
            inner = survey(container.pid).processes[2]
            assert inner.vpid == number
            with pytest.raises(NoSuchProcess, match=f"in another one it is pid {inner.pid} here"):
                explain(number)
        finally:
            container.kill()


def test_the_first_process_of_all() -> None:
    (obstacle,) = explain(1)
    assert obstacle.why.startswith("is the first process here")


def test_a_kernel_thread() -> None:
    require_kernel_threads()
    assert whys(list(explain(2))) == ["process: is a kernel thread"]


def test_what_has_ended_is_nothing_to_move() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert whys(list(explain(process.pid))) == ["process: has ended (zombie)"]


def test_lazyproc_itself() -> None:
    assert "process: is lazyproc itself" in whys(list(explain(os.getpid())))


# --- processes and threads --------------------------------------------------------------------------------


def test_a_controlling_terminal() -> None:
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)

    def take_terminal() -> None:
        os.setsid()
        os.close(os.open(name, os.O_RDWR))

    try:
        (why,) = whys(found(take_terminal))
    finally:
        os.close(ours)
        os.close(theirs)
    assert why.startswith("process: has a controlling terminal (136:")


def test_somebody_traces_it() -> None:
    with stopped(os.setsid) as tasks:
        tracee = Tracee(tasks[0].pid)
        tracee.seize()
        try:
            obstacles = list(explain(tasks[0].pid))
        finally:
            tracee.interrupt()
            tracee.wait_stop(1000)
            tracee.detach()
    assert whys(obstacles) == [f"thread: is traced by process {os.getpid()}"]
    assert "strace" in obstacles[0].remedy


def test_who_works_for_lazyproc_is_not_taken_apart() -> None:
    """All of its descriptors would be obstacles, and none of them is why."""
    with helper_at_work() as pid:
        (obstacle,) = explain(pid)
    assert (obstacle.pid, obstacle.why) == (pid, "is at work for lazyproc (lazyproc-test)")
    assert "lazyproc sessions" in obstacle.remedy


@contextmanager
def helper_at_work() -> Iterator[int]:
    """One of the helpers that outlive a command, until its end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def work() -> None:
            ours.close()
            theirs.send(b"I am at work")
            theirs.recv(1)

        pid = daemon(work, "lazyproc-test")
        theirs.close()
        ours.recv(64)
        yield pid


VFORK = """
#include <unistd.h>
int main(void)
{
    setsid();
    if (vfork() == 0) {
        (void)!write(1, "x", 1);
        pause();
        _exit(0);
    }
}
"""
ENDED_LEADER = """
#include <pthread.h>
#include <unistd.h>
static void *other(void *leader)
{
    pthread_join(*(pthread_t *)leader, NULL);
    (void)!write(1, "x", 1);
    pause();
    return NULL;
}
int main(void)
{
    static pthread_t leader, thread;
    leader = pthread_self();
    pthread_create(&thread, NULL, other, &leader);
    pthread_exit(NULL);
}
"""


@contextmanager
def compiled(source: str, directory: Path) -> Iterator[int]:
    """The pid of a program that has written its one byte; killed with its group at the end."""
    program = directory / "program"
    subprocess.run(
        [require("gcc"), "-xc", "-", "-o", program, "-pthread"], input=source, text=True, check=True
    )
    with subprocess.Popen([program], start_new_session=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        try:
            yield process.pid
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_vfork_parent_sleeps_without_signals_and_shares_its_memory(tmp_path: Path) -> None:
    with compiled(VFORK, tmp_path) as pid:
        (child,) = proc.children_of(pid, pid)
        obstacles = list(explain(pid))
    words = whys(obstacles)
    assert (
        f"thread: waits, state D, until process {child} calls exec or ends, which it has made by vfork(2)"
        in words
    )
    assert f"process: shares its memory (CLONE_VM) with process {pid}" in words
    assert next(o.pid for o in obstacles if "CLONE_VM" in o.why) == child
    assert "exec" in next(o.remedy for o in obstacles if "state D" in o.why)


def test_a_first_thread_that_has_ended(tmp_path: Path) -> None:
    with compiled(ENDED_LEADER, tmp_path) as pid:
        assert "process: its first thread has ended and others run on" in whys(list(explain(pid)))


def test_directories_shared_with_another_process() -> None:
    def share() -> None:
        os.setsid()
        if syscall(SYS_CLONE, CLONE_FS | signal.SIGCHLD, 0, 0, 0, 0) == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            os.close(REPORT)
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)

    (why,) = whys(found(share))
    assert why.startswith("process: shares its directories (CLONE_FS) with process ")


def test_memory_shared_with_a_process_outside_of_the_tree() -> None:
    kept: list[mmap.mmap] = []

    def share() -> None:
        os.setsid()
        kept.append(mmap.mmap(-1, 4096))

    with stopped(share, lambda: None) as (parent, child):
        assert explain(parent.pid) == ()
        (obstacle,) = explain(child.pid)
    assert obstacle.why.startswith("shares memory at 0x")
    assert f"(/dev/zero) with process {parent.pid}, which is not in the tree" in obstacle.why


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (fds.CLONE_FILES, "thread: does not share its process's descriptor table (CLONE_FILES)"),
        (CLONE_FS, "thread: does not share its process's directories (CLONE_FS)"),
        (CLONE_NEWUTS, "thread: is in another uts namespace than its process"),
    ],
)
def test_threads_that_live_apart(flags: int, why: str) -> None:
    def apart() -> None:
        os.setsid()
        done = threading.Event()

        def live() -> None:
            unshare(flags)
            if flags == fds.CLONE_FILES:
                os.close(REPORT)
            done.set()
            signal.pause()

        threading.Thread(target=live, daemon=True).start()
        done.wait()

    assert why in whys(found(apart))


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (CLONE_NEWUTS, "process: is in another uts namespace than the root of the tree"),
        (CLONE_NEWUSER, "process: is in another user namespace than lazyproc"),
        (CLONE_NEWPID, "process: its future children are in another pid namespace than the root of the tree"),
    ],
)
def test_namespaces_of_a_childs_own(flags: int, why: str) -> None:
    require_root()
    with stopped(os.setsid, lambda: unshare(flags)) as tasks:
        obstacles = list(explain(tasks[0].pid))
        assert [o.pid for o in obstacles if f"process: {o.why}" == why] == [tasks[1].pid]


def test_a_whole_tree_in_other_namespaces_is_a_note() -> None:
    require_root()
    events: list[Event] = []

    def move_out() -> None:
        os.setsid()
        unshare(CLONE_NEWUTS)

    with stopped(move_out, lambda: None) as tasks:
        assert explain(tasks[0].pid, listener=events.append) == ()
    words = [event.text for event in events if isinstance(event, Note)]
    assert sum("its namespaces (uts) stay here" in text for text in words) == 1
    # The two are forks of this test, and share what it has.
    assert all("namespaces" in text or "since a fork" in text for text in words), words


def test_a_parent_that_respawns_is_named() -> None:
    """By a real one's name: a parent that calls itself so."""
    events: list[Event] = []

    def be_a_supervisor() -> None:
        os.setsid()
        Path("/proc/self/comm").write_text("runsv")

    with stopped(be_a_supervisor, lambda: None) as tasks:
        assert explain(tasks[1].pid, listener=events.append) == ()
    words = [event.text for event in events if isinstance(event, Note)]
    assert any(f"its parent, pid {tasks[0].pid} (runsv), sees it end here" in text for text in words), words


def test_a_deadline_policy() -> None:
    def promise() -> None:
        os.setsid()
        attributes = bytearray(struct.pack("<IIQiIQQQ", 48, 6, 0, 0, 0, 1_000_000, 100_000_000, 100_000_000))
        address = ctypes.addressof(ctypes.c_char.from_buffer(attributes))
        try:
            syscall(SYS_SCHED_SETATTR, 0, address, 0)
        except PermissionError:
            return  # the policy says so

    with stopped(promise) as tasks:
        if os.sched_getscheduler(tasks[0].pid) != 6:
            pytest.skip("the kernel promises no budget here")
        words = whys(list(explain(tasks[0].pid)))
    assert words == ["process: runs under SCHED_DEADLINE, whose budget cannot be promised elsewhere"]


def _elf32() -> bytes:
    """A 32-bit program that calls pause(2) for ever: mov eax, 29; int 0x80; jmp."""
    code = b"\xb8\x1d\x00\x00\x00\xcd\x80\xeb\xf7"
    base, head = 0x8048000, 52 + 32
    size = head + len(code)
    header = b"\x7fELF\x01\x01\x01" + bytes(9)
    header += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, base + head, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    return header + struct.pack("<IIIIIIII", 1, 0, base, base, size, size, 5, 0x1000) + code


def test_a_32_bit_program(tmp_path: Path) -> None:
    program = tmp_path / "old"
    program.write_bytes(_elf32())
    program.chmod(0o755)
    try:
        process = subprocess.Popen([program], start_new_session=True, **_SILENT)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        pytest.skip("this kernel runs no 32-bit programs")
    with process:
        try:
            words = whys(list(explain(process.pid)))
        finally:
            process.kill()
    assert "process: is a 32-bit program" in words


# --- memory and what outlives processes -------------------------------------------------------------------


def test_no_vdso() -> None:
    def unmap() -> None:
        os.setsid()
        with open("/proc/self/maps") as maps:
            spans = [line.split()[0].split("-") for line in maps if line.rstrip().endswith("[vdso]")]
        ((start, end),) = ((int(first, 16), int(last, 16)) for first, last in spans)
        syscall(SYS_MUNMAP, start, end - start)

    assert whys(found(unmap)) == ["process: has no [vdso] mapping"]


def test_huge_pages() -> None:
    kept = []

    def map_huge() -> None:
        os.setsid()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_HUGETLB
        kept.append(mmap.mmap(-1, 2 << 20, flags=flags))

    (why,) = whys(found(map_huge))
    assert why == "mapping: is a huge page mapping (hugetlbfs)"


def test_a_userfaultfd_of_its_own() -> None:
    require_root()
    kept = []

    def serve_itself() -> None:
        os.setsid()
        memory = mmap.mmap(-1, 3 * 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        userfaultfd = Userfaultfd.open()
        userfaultfd.api(Feature(0))
        at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in range(0, 3 * 8192, 8192):
            userfaultfd.register(at + page, 4096)
        kept.append((memory, userfaultfd))

    obstacles = found(serve_itself)
    words = whys(obstacles)
    assert sum(why.startswith("mapping: is registered with a userfaultfd") for why in words) == 1
    assert any(each.where.endswith(" and 2 more") for each in obstacles)
    assert any("userfaultfd" in why and why.startswith("fd:") for why in words)


def test_descriptors_are_asked_too(tmp_path: Path) -> None:
    def lease() -> None:
        os.setsid()
        fcntl.fcntl(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT), fcntl.F_SETLEASE, fcntl.F_WRLCK)

    (why,) = whys(found(lease))
    assert why.startswith("fd: it holds a lease for writing")


def test_more_address_space_than_anybody_follows_is_an_obstacle_to_a_move() -> None:
    def reserve() -> None:
        os.setsid()
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        at = libc.mmap(None, ctypes.c_size_t(5 << 40), mmap.PROT_READ, flags, -1, ctypes.c_long(0))
        assert at != ctypes.c_void_p(-1).value

    with stopped(reserve) as tasks:
        (why,) = whys([*explain(tasks[0].pid)])
        assert why.startswith("process: has much address space: the tree has 5.0")
        assert not explain(tasks[0].pid, permits=ALL)


def test_more_sockets_than_a_shell_lets_us_have_descriptors() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 2048:
        lacking("more than 1200 descriptors for one process", "raise the limit: ulimit -Hn")
    kept: list[tuple[socket.socket, socket.socket]] = []

    def many() -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        kept.extend(socket.socketpair() for _ in range(600))

    with stopped(many) as (task,):
        done = subprocess.run(
            [*CLI, "explain", str(task.pid)],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr


# Connections that come and go, as those of a server do.
CHURN = """
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>
int main(void)
{
    int set = epoll_create1(0);
    (void)!write(1, "x", 1);
    for (;;) {
        struct epoll_event event = { .events = EPOLLIN };
        int fds[8];
        for (int i = 0; i < 8; i++)
            epoll_ctl(set, EPOLL_CTL_ADD, fds[i] = eventfd(0, 0), &event);
        for (int i = 0; i < 8; i++)
            close(fds[i]);
    }
}
"""


def test_watched_files_that_come_and_go_are_no_obstacle(tmp_path: Path) -> None:
    with compiled(CHURN, tmp_path) as pid:
        for _ in range(100):
            assert not [each for each in explain(pid) if "watches" in each.why]


def test_a_semaphore_set_that_it_used() -> None:
    number = syscall(SYS_SEMGET, 0, 1, 0o600)
    operation = ctypes.create_string_buffer(struct.pack("<HhH", 0, 1, 0))

    def post() -> None:
        os.setsid()
        syscall(SYS_SEMOP, number, ctypes.addressof(operation), 1)

    try:
        assert whys(found(post)) == [
            f"process: used System V semaphore set {number}, which stays on this host"
        ]
    finally:
        syscall(SYS_SEMCTL, number, 0, 0)  # IPC_RMID


def test_a_message_queue_that_it_used() -> None:
    number = syscall(SYS_MSGGET, 0, 0o600)
    message = ctypes.create_string_buffer(struct.pack("<q", 1) + b"hello")

    def send() -> None:
        os.setsid()
        syscall(SYS_MSGSND, number, ctypes.addressof(message), 5, 0)

    try:
        assert whys(found(send)) == [
            f"process: used System V message queue {number}, which stays on this host"
        ]
    finally:
        syscall(SYS_MSGCTL, number, 0, 0)


def test_a_child_that_ends_meanwhile_is_left_out() -> None:
    """Every process of a tree that comes and goes is either there or not; nothing is raised."""
    churn = "while :; do true & true & wait; done"
    with subprocess.Popen(["sh", "-c", churn], start_new_session=True, **_SILENT) as process:
        try:
            for _ in range(30):
                assert survey(process.pid).root.pid == process.pid
        finally:
            os.killpg(process.pid, signal.SIGKILL)


_SILENT: dict[str, Any] = {
    "stdin": subprocess.DEVNULL,
    "stdout": subprocess.DEVNULL,
    "stderr": subprocess.DEVNULL,
}
