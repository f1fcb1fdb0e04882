"""The parsers against this kernel: what they say of living processes is what the system calls say."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ptrace.debugger.memory_mapping import readProcessMappings

from lazyproc.errors import NoSuchProcess, PermissionDenied
from lazyproc.kernel import proc
from lazyproc.kernel.proc_fdinfo import FdInfo, fdinfo
from tests.needs import require, require_root

ME = os.getpid()
NOBODY = 65534
AT_NULL, AT_HWCAP = 0, 16
libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def child(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has said something on its standard output and waits for the end of its input."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", f"import os, sys\n{code}\nprint('ready', flush=True)\nsys.stdin.read()"


@contextmanager
def mapped(path: Path) -> Iterator[proc.MapsEntry]:
    """A page of a file of that name, mapped here, and its line."""
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        (entry,) = (entry for entry in proc.maps(proc.read(ME, "maps")) if entry.start == start)
        assert entry.inode == path.stat().st_ino
        yield entry


# --- memory -------------------------------------------------------------------------------------------------


class _Process:
    pid = ME


def test_maps_agree_with_python_ptrace() -> None:
    theirs = [
        (m.start, m.end, m.permissions, m.offset, (m.major_device, m.minor_device), m.inode, m.pathname or "")
        for m in readProcessMappings(_Process())
    ]
    ours = [
        (*entry[:6], entry.path + " (deleted)" * entry.deleted) for entry in proc.maps(proc.read(ME, "maps"))
    ]
    assert len(ours) > 10
    # The parsing itself may move the heap's end.
    assert [entry for entry in ours if entry[6] != "[heap]"] == [
        entry for entry in theirs if entry[6] != "[heap]"
    ]


@pytest.mark.parametrize(
    "name", ["plain", "two  spaces ", "new\nline", "back\\slash \\134", "caf\xe9", "a:b (x)"]
)
def test_the_path_of_a_mapped_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with mapped(path) as entry:
        assert (entry.path, entry.deleted) == (str(path), False)
        assert (entry.perms, entry.offset, entry.end - entry.start) == ("rw-s", 0, 4096)
        assert os.makedev(*entry.dev) == path.stat().st_dev


def test_a_mapped_file_that_was_deleted(tmp_path: Path) -> None:
    path = tmp_path / "gone"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        path.unlink()
        found = [entry for entry in proc.maps(proc.read(ME, "maps")) if entry.path == str(path)]
    assert [entry.deleted for entry in found] == [True]


def test_smaps_have_the_same_lines_and_what_was_touched() -> None:
    with mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory.madvise(mmap.MADV_DONTFORK)
        memory[: 3 * 4096] = bytes(3 * 4096)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        blocks = {block.entry.start: block for block in proc.smaps(proc.read(ME, "smaps"))}
    block = blocks[start]
    assert (block.rss, block.anonymous, block.page_size, block.anon_huge) == (3 * 4096, 3 * 4096, 4096, 0)
    assert {"rd", "wr", "nh", "dc"} <= block.vm_flags


def test_auxv_is_what_the_program_was_given() -> None:
    words = proc.auxv(proc.read(ME, "auxv"))
    vector = dict(zip(words[::2], words[1::2], strict=True))
    libc.getauxval.restype = ctypes.c_ulong
    del vector[AT_NULL], vector[AT_HWCAP]  # glibc gives its own for AT_HWCAP
    assert vector == {key: libc.getauxval(ctypes.c_ulong(key)) for key in vector}
    assert len(vector) > 10


# --- tasks --------------------------------------------------------------------------------------------------


def test_stat_and_status_of_ourselves() -> None:
    stat, status = proc.stat(proc.read(ME, "stat")), proc.status(proc.read(ME, "status"))
    ids = (ME, os.getppid(), os.getpgid(0), os.getsid(0))
    assert (stat.pid, stat.ppid, stat.pgrp, stat.session) == ids
    assert (status.pid, status.tgid, status.ppid) == (ME, ME, os.getppid())
    assert status.uid[:3] == os.getresuid()
    assert status.gid[:3] == os.getresgid()
    assert set(status.groups) == set(os.getgroups())
    umask = os.umask(0)
    os.umask(umask)
    assert status.umask == umask
    assert stat.comm == Path(f"/proc/{ME}/comm").read_text().removesuffix("\n")
    assert stat.processor in os.sched_getaffinity(0)
    assert stat.policy == os.sched_getscheduler(0)
    assert status.sig_caught >> (signal.SIGINT - 1) & 1


@pytest.mark.parametrize("comm", [b") R 1 (", b"a\nb", b"((", b"x\\n", b"\xff\xfe", b"))))))))))))))) 1"])
def test_a_command_named_to_confuse(comm: bytes) -> None:
    with child(*python(f"import ctypes; ctypes.CDLL(None).prctl(15, {comm!r})")) as process:
        stat, status = (
            proc.stat(proc.read(process.pid, "stat")),
            proc.status(proc.read(process.pid, "status")),
        )
    assert (stat.comm, stat.ppid) == (os.fsdecode(comm[:15]), ME)
    assert (status.pid, status.ppid) == (process.pid, ME)


def test_a_zombie() -> None:
    with subprocess.Popen([sys.executable, "-c", "import os; os._exit(3)"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        stat, status = (
            proc.stat(proc.read(process.pid, "stat")),
            proc.status(proc.read(process.pid, "status")),
        )
        assert (stat.state, stat.exit_code, status.state, status.umask) == ("Z", 3 << 8, "Z", None)
        assert "pid" in proc.namespaces(process.pid)


def test_a_tracer_is_named() -> None:
    with child(*python("import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)")) as process:
        assert proc.status(proc.read(process.pid, "status")).tracer_pid == ME


def test_limits() -> None:
    limits = proc.limits(proc.read(ME, "limits"))
    ours = [resource.getrlimit(number) for number in range(16)]  # -1 is RLIM_INFINITY there
    assert limits == tuple((soft % 2**64, hard % 2**64) for soft, hard in ours)


def test_cgroup_has_a_line_for_each_hierarchy() -> None:
    groups = proc.cgroup(proc.read(ME, "cgroup"))
    assert len(groups) == len(Path("/proc/self/cgroup").read_text().splitlines())
    assert all(path.startswith("/") for path in groups.values())


def test_namespaces_are_named_by_inode() -> None:
    names = os.listdir("/proc/self/ns")
    assert proc.namespaces(ME) == {name: os.stat(f"/proc/self/ns/{name}").st_ino for name in names}


def test_children_and_threads() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        assert proc.task_ids(ME)[0] == ME
        assert thread.native_id in proc.task_ids(ME)
    finally:
        release.set()
        thread.join()
    with child(*python("")) as process:
        assert process.pid in proc.children_of(ME, threading.get_native_id())


def test_descriptors_ascend() -> None:
    reading, writing = os.pipe()
    numbers = proc.descriptor_numbers(ME)
    os.close(reading)
    os.close(writing)
    assert {reading, writing} <= set(numbers)
    assert list(numbers) == sorted(numbers)


# --- time ---------------------------------------------------------------------------------------------------


class _SigEvent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("tid", ctypes.c_int),
        ("padding", ctypes.c_byte * 44),
    )


def test_posix_timers() -> None:
    wanted = []
    tid = threading.get_native_id()
    for notify, clock in ((0, 1), (1, 0), (4, 7)):
        event = _SigEvent(value=0x7FFF12345678, signal=34 + notify, notify=notify, tid=tid)
        timer = ctypes.c_int()
        assert libc.syscall(222, clock, ctypes.byref(event), ctypes.byref(timer)) == 0  # timer_create
        wanted.append(proc.PosixTimerInfo(timer.value, 34 + notify, 0x7FFF12345678, notify, tid, clock))
    found = proc.timers(proc.read(ME, "timers"))
    for timer_info in wanted:
        libc.syscall(226, timer_info.id)  # timer_delete
    assert found == tuple(wanted)


def test_the_offsets_of_a_time_namespace() -> None:
    require_root()
    offsets = ("--monotonic", "1000", "--boottime", "-5")
    unshare = str(require("unshare"))
    with child(unshare, "--time", *offsets, *python("")) as process:
        found = proc.timens_offsets(proc.read(process.pid, "timens_offsets"))
    assert found == proc.TimensOffsets(monotonic_ns=1000 * 10**9, boottime_ns=-5 * 10**9)


def test_what_a_child_is_blocked_in() -> None:
    with child(*python("")) as process:
        (tid,) = proc.task_ids(process.pid)
        while (call := proc.syscall(proc.read(process.pid, f"task/{tid}/syscall"))) is None:
            pass
    assert (call.nr, call.args[0]) == (0, 0)  # read(0, ...)


def test_we_ourselves_give_up_the_cpu_to_wait() -> None:
    name = f"task/{threading.get_native_id()}/sched"
    before = proc.sched(proc.read(ME, name))
    select.select([], [], [], 0.001)
    after = proc.sched(proc.read(ME, name))
    assert after.voluntary > before.voluntary
    assert after.exec_start_ns - before.exec_start_ns >= 1_000_000


# --- descriptors --------------------------------------------------------------------------------------------


def info_of(fd: int) -> FdInfo:
    return fdinfo(proc.read(ME, f"fdinfo/{fd}"))


def test_fdinfo_of_a_file_and_its_locks(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        file.write(b"twelve bytes")
        fcntl.flock(file, fcntl.LOCK_SH)
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 5)
        info = info_of(file.fileno())
        stat = os.fstat(file.fileno())
    assert (info.pos, info.flags & os.O_ACCMODE, info.inode) == (12, os.O_RDWR, stat.st_ino)
    assert info.flags & os.O_CLOEXEC
    assert {(lock.kind, lock.mode, lock.start, lock.end) for lock in info.locks} == {
        ("FLOCK", "READ", 0, None),
        ("POSIX", "WRITE", 5, 14),
    }
    assert {os.makedev(*lock.dev) for lock in info.locks} == {stat.st_dev}


def test_fdinfo_of_an_epoll_set() -> None:
    reading, writing = os.pipe()
    with select.epoll() as epoll:
        epoll.register(reading, select.EPOLLIN | select.EPOLLET)
        epoll.register(writing, select.EPOLLOUT)
        first, second = sorted(info_of(epoll.fileno()).epoll, key=lambda target: target.fd)
        stat = os.fstat(reading)
    os.close(reading)
    os.close(writing)
    assert (first.fd, second.fd) == (reading, writing)
    assert first.events & (select.EPOLLIN | select.EPOLLET) == select.EPOLLIN | select.EPOLLET
    assert (first.data, first.inode, os.makedev(*first.dev)) == (reading, stat.st_ino, stat.st_dev)


def test_fdinfo_of_an_eventfd_a_timerfd_and_a_signalfd() -> None:
    event = os.eventfd(0x1F, os.EFD_SEMAPHORE)
    timer = libc.timerfd_create(1, 0)
    libc.timerfd_settime(timer, 0, (ctypes.c_long * 4)(1, 2, 1000, 5), None)
    signals = libc.signalfd(-1, (ctypes.c_ulong * 1)(1 << 9 | 1 << 63), 0)
    counter, clock, mask = info_of(event).eventfd, info_of(timer).timerfd, info_of(signals).signalfd_mask
    for fd in (event, timer, signals):
        os.close(fd)
    assert counter is not None
    assert (counter.count, counter.semaphore) == (0x1F, True)
    assert clock is not None
    assert (clock.clock, clock.ticks, clock.settime_flags, clock.interval_ns) == (1, 0, 0, 1_000_000_002)
    assert 900 * 10**9 < clock.value_ns <= 1000 * 10**9 + 5
    assert mask == 1 << 9 | 1 << 63


def test_fdinfo_of_inotify_counts_watches_in_hexadecimal(tmp_path: Path) -> None:
    fd = libc.inotify_init1(os.O_CLOEXEC)
    for number in range(1, 18):
        (tmp_path / str(number)).mkdir()
        assert libc.inotify_add_watch(fd, os.fsencode(tmp_path / str(number)), 0x102) == number
    watches = info_of(fd).inotify
    os.close(fd)
    assert sorted(watch.wd for watch in watches) == list(range(1, 18))
    for watch in watches:
        stat = (tmp_path / str(watch.wd)).stat()
        assert (watch.inode, os.makedev(*watch.dev), watch.mask) == (stat.st_ino, stat.st_dev, 0x102)


def test_fdinfo_of_a_pidfd() -> None:
    fd = os.pidfd_open(ME)
    info = info_of(fd)
    os.close(fd)
    assert info.pidfd == ME


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_process_that_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    for ask in (lambda: proc.read(process.pid, "maps"), lambda: proc.namespaces(process.pid)):
        with pytest.raises(NoSuchProcess, match=str(process.pid)):
            ask()
    with pytest.raises(NoSuchProcess, match=str(process.pid)):
        proc.task_ids(process.pid)


def test_a_zombie_has_no_mappings() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert proc.maps(proc.read(process.pid, "maps")) == ()


def test_a_process_of_somebody_else() -> None:
    require_root()
    os.seteuid(NOBODY)
    try:
        with pytest.raises(PermissionDenied, match=r"/proc/1/maps.*root"):
            proc.read(1, "maps")
        with pytest.raises(PermissionDenied):
            proc.namespaces(1)
    finally:
        os.seteuid(0)
