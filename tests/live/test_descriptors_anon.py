"""eventfd, timerfd, signalfd, epoll, inotify, memfd, and who gets their signals."""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import os
import select
import signal
import socket
import struct
import time
from collections import Counter
from pathlib import Path

import pytest

from lazyproc.dump import registry
from lazyproc.dump.descriptors import gather_descriptors
from lazyproc.kernel import fds as kernel
from lazyproc.model import Clocks, Epoll, EpollTarget, OpenFile, SharedMemory, TimerFd
from lazyproc.restore.files import make_files
from lazyproc.restore.memfds import finish_memfd
from lazyproc.restore.owners import OwnerRow, owner_rows
from tests.live.descriptors import (
    at,
    checkpoint_of,
    gathered_from,
    made,
    made_from,
    obstacle_words,
    rows_of,
    stopped,
)

SECOND = 10**9
TFD_CANCEL_ON_SET = 2
CLOCK_REALTIME, CLOCK_MONOTONIC = 0, 1
IN_CREATE, IN_DELETE, IN_ONESHOT = 0x100, 0x200, 0x80000000


# --- eventfd ------------------------------------------------------------------------------------------------


def test_eventfd_count_and_semaphore() -> None:
    def body() -> None:
        at(10, os.eventfd(7))
        at(11, os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK))
        at(12, os.eventfd(0))
        os.eventfd_write(12, 1 << 40)

    with made_from(body) as fds:
        assert os.eventfd_read(fds[10]) == 7
        assert [os.eventfd_read(fds[11]) for _ in range(3)] == [1, 1, 1]
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fds[11])
        assert os.eventfd_read(fds[12]) == 1 << 40


# --- timerfd ------------------------------------------------------------------------------------------------


def _timer(number: int, clock: int, value_ns: int, interval_ns: int = 0, flags: int = 0) -> None:
    at(number, kernel.timerfd_create(clock, os.O_NONBLOCK))
    kernel.timerfd_settime(number, flags, kernel.TimerSetting(value_ns, interval_ns))


def test_timer_goes_on_with_the_time_that_was_left() -> None:
    def body() -> None:
        _timer(10, CLOCK_MONOTONIC, 1000 * SECOND, 7 * SECOND)
        _timer(11, CLOCK_MONOTONIC, time.monotonic_ns() + 500 * SECOND, 0, kernel.TFD_TIMER_ABSTIME)
        at(12, kernel.timerfd_create(CLOCK_MONOTONIC, 0))  # never armed

    with made_from(body) as fds:
        value, interval = kernel.timerfd_gettime(fds[10])
        assert 990 * SECOND < value < 1000 * SECOND
        assert interval == 7 * SECOND
        assert 490 * SECOND < kernel.timerfd_gettime(fds[11]).value_ns < 500 * SECOND
        assert kernel.timerfd_gettime(fds[12]) == (0, 0)
        with pytest.raises(BlockingIOError):
            os.read(fds[10], 8)


def test_expirations_not_yet_read() -> None:
    def body() -> None:
        _timer(10, CLOCK_MONOTONIC, 1_000_000, 1_000_000)
        _timer(11, CLOCK_MONOTONIC, 1)
        poll = select.poll()
        poll.register(11, select.POLLIN)
        poll.poll()

    with stopped(body) as tasks:
        gathered = gather_descriptors(tasks)
    with gathered.sockets, made(checkpoint_of(gathered)) as fds:
        timers = [file.resource for file in gathered.files.values() if isinstance(file.resource, TimerFd)]
        periodic = next(timer for timer in timers if timer.interval_ns)
        assert periodic.ticks >= 1 or periodic.value_ns > 0
        (ticks,) = struct.unpack("Q", os.read(fds[11], 8))
        assert ticks == 1
        with pytest.raises(BlockingIOError):
            os.read(fds[11], 8)  # a single shot does not come twice
        poll = select.poll()
        poll.register(fds[10], select.POLLIN)
        assert poll.poll(1000)  # and the periodic one runs
        (ticks,) = struct.unpack("Q", os.read(fds[10], 8))
        assert ticks >= max(periodic.ticks, 1)


def test_wall_clock_timer_keeps_its_date() -> None:
    """The checkpoint is pretended to be 100 s old: a timer for a date 300 s ahead has 200 s left."""
    flags = kernel.TFD_TIMER_ABSTIME | TFD_CANCEL_ON_SET

    def body() -> None:
        _timer(10, CLOCK_REALTIME, time.time_ns() + 300 * SECOND, 0, flags)
        _timer(11, CLOCK_REALTIME, 300 * SECOND)

    with gathered_from(body) as gathered:
        clocks = Clocks(0, 0, time.time_ns() - 100 * SECOND)
        with made(checkpoint_of(gathered, clocks)) as fds:
            assert 190 * SECOND < kernel.timerfd_gettime(fds[10]).value_ns < 200 * SECOND
            with open(f"/proc/self/fdinfo/{fds[10]}") as text:
                assert "settime flags: 03" in text.read()
            assert 290 * SECOND < kernel.timerfd_gettime(fds[11]).value_ns < 300 * SECOND


# --- signalfd -----------------------------------------------------------------------------------------------


def test_signalfd_reads_the_signals_of_its_mask() -> None:
    mask = 1 << (signal.SIGUSR1 - 1) | 1 << (signal.SIGRTMIN - 1)
    with made_from(lambda: at(10, kernel.signalfd(mask, os.O_NONBLOCK))) as fds:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
        try:
            signal.raise_signal(signal.SIGUSR1)
            assert struct.unpack_from("I", os.read(fds[10], 128))[0] == signal.SIGUSR1
            signal.raise_signal(signal.SIGUSR2)
            with pytest.raises(BlockingIOError):
                os.read(fds[10], 128)
            assert signal.sigwait({signal.SIGUSR2}) == signal.SIGUSR2
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- epoll --------------------------------------------------------------------------------------------------


def _epoll(number: int) -> None:
    at(number, kernel.epoll_create(0))


def _wait(epfd: int) -> list[tuple[int, int]]:
    """(events, data) of epoll_wait without waiting; select.epoll would cut data to 32 bits."""
    out = ctypes.create_string_buffer(12 * 16)
    count = ctypes.CDLL(None).epoll_wait(epfd, out, 16, 0)
    return [struct.unpack_from("<IQ", out, 12 * at) for at in range(count)]


def test_epoll_entries_become_rows_of_the_task() -> None:
    data = 0xFEDC_BA98_7654_3210

    def body() -> None:
        at(10, os.eventfd(1))
        at(11, os.eventfd(0))
        _epoll(20)
        kernel.epoll_add(20, 10, select.EPOLLIN, data)
        kernel.epoll_add(20, 11, select.EPOLLIN | select.EPOLLET, 11)

    with gathered_from(body) as gathered:
        checkpoint = checkpoint_of(gathered)
        rows = sorted(rows_of(checkpoint))
        hidden = select.EPOLLERR | select.EPOLLHUP
        assert rows == [
            (20, 10, select.EPOLLIN | hidden, data),
            (20, 11, select.EPOLLIN | select.EPOLLET | hidden, 11),
        ]
        with made(checkpoint) as fds:
            assert _wait(fds[20]) == []
            for epfd, fd, events, value in rows:
                kernel.epoll_add(fds[epfd], fds[fd], events, value)
            assert _wait(fds[20]) == [(select.EPOLLIN, data)]


def test_epoll_entry_under_a_number_that_is_another_file_now() -> None:
    def body() -> None:
        _epoll(20)
        at(10, os.eventfd(1))
        kernel.epoll_add(20, 10, select.EPOLLIN, 77)
        os.dup2(10, 30)
        at(10, os.eventfd(0))  # the same number, another file
        kernel.epoll_add(20, 10, select.EPOLLIN, 78)

    with gathered_from(body) as gathered:
        checkpoint = checkpoint_of(gathered)
        rows = rows_of(checkpoint)
        assert [(row[1], row[3]) for row in rows] == [(10, 78)]
        with made(checkpoint) as fds:
            with open(f"/proc/self/fdinfo/{fds[20]}") as text:
                assert "tfd:       10 " in text.read()
            assert _wait(fds[20]) == [(select.EPOLLIN, 77)]
            os.eventfd_read(fds[30])
            assert _wait(fds[20]) == []


def test_epoll_entries_under_numbers_that_nobody_has_any_more() -> None:
    """Whoever adds them again has descriptors, too, and needs every one of those numbers in turn."""
    numbers = range(100, 150)

    def body() -> None:
        _epoll(5)
        for number in numbers:
            at(number, os.eventfd(1))
            kernel.epoll_add(5, number, select.EPOLLIN, number)
            os.dup2(number, 100 + number)
            os.close(number)

    with gathered_from(body) as gathered:
        checkpoint = checkpoint_of(gathered)
        assert rows_of(checkpoint) == []
        with made(checkpoint) as fds:
            found = set()
            for _ in numbers:
                _, number = _wait(fds[5])[0]
                os.eventfd_read(fds[100 + number])
                found.add(number)
            assert found == set(numbers)
            assert _wait(fds[5]) == []


def test_epoll_asks_for_most_files_once_and_for_sockets_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[int] = Counter()

    def counted(pid: int, fd: int, epoll_pid: int, epfd: int, target: int, nth: int) -> int:
        asked[target] += 1
        return kernel.kcmp_epoll_target(pid, fd, epoll_pid, epfd, target, nth)

    events, sockets = range(100, 140), range(140, 180)

    def body() -> None:
        _epoll(20)
        for number in events:
            at(number, os.eventfd(0))
        for number in sockets[::2]:
            for beside, sock in enumerate(socket.socketpair()):
                at(number + beside, sock.detach())
        for number in (*events, *sockets):
            kernel.epoll_add(20, number, select.EPOLLIN, number)

    monkeypatch.setattr(registry, "kcmp_epoll_target", counted)
    with gathered_from(body) as gathered:
        (rows,) = gathered.descriptors.values()
        files = {row.fd: row.file_id for row in rows}
        watched = gathered.files[files[20]].resource
        assert isinstance(watched, Epoll)
        assert {target.fd: target.file_id for target in watched.targets} == {
            number: files[number] for number in (*events, *sockets)
        }
    assert asked == dict.fromkeys(events, 1)


def test_epoll_of_a_socket_under_a_number_that_is_another_socket_now() -> None:
    def body() -> None:
        _epoll(20)
        for number, sock in zip((10, 11), socket.socketpair(), strict=True):
            at(number, sock.detach())
        kernel.epoll_add(20, 10, select.EPOLLIN, 77)
        os.dup2(10, 30)
        for number, sock in zip((10, 12), socket.socketpair(), strict=True):
            at(number, sock.detach())
        kernel.epoll_add(20, 10, select.EPOLLIN, 78)

    with gathered_from(body) as gathered:
        (rows,) = gathered.descriptors.values()
        files = {row.fd: row.file_id for row in rows}
        watched = gathered.files[files[20]].resource
        assert isinstance(watched, Epoll)
        found = {(target.data, target.fd, target.file_id) for target in watched.targets}
        assert found == {(77, 10, files[30]), (78, 10, files[10])}


def test_epoll_in_epoll_and_a_shared_set() -> None:
    def parent() -> None:
        _epoll(20)
        _epoll(21)
        at(10, os.eventfd(0))
        kernel.epoll_add(21, 20, select.EPOLLIN, 1)
        kernel.epoll_add(20, 10, select.EPOLLIN, 2)

    def child() -> None:
        os.close(10)
        at(11, os.eventfd(0))
        kernel.epoll_add(20, 11, select.EPOLLIN, 3)

    with gathered_from(parent, child) as gathered:
        checkpoint = checkpoint_of(gathered)
        assert sorted(row[3] for row in rows_of(checkpoint)) == [1, 2]
        other = dataclasses.replace(checkpoint, tasks=tuple(reversed(checkpoint.tasks)))
        assert sorted(row[3] for row in rows_of(other)) == [1, 3]


def test_epoll_that_watches_what_nobody_has_any_more() -> None:
    def child() -> None:
        _epoll(20)
        kernel.epoll_add(20, 10, select.EPOLLIN, 0)
        os.close(10)

    with stopped(lambda: at(10, os.eventfd(0)), child) as tasks:
        gathered = gather_descriptors(tasks[1:])
        with gathered.sockets:
            (obstacle,) = gathered.obstacles
            assert obstacle.where == "fd 20"
            assert "added as descriptor 10, that no process of the tree has open" in obstacle.why
            assert "EPOLL_CTL_DEL" in obstacle.remedy


def test_epoll_that_watches_a_signalfd_under_a_lost_number() -> None:
    def body() -> None:
        _epoll(20)
        at(10, kernel.signalfd(1, 0))
        kernel.epoll_add(20, 10, select.EPOLLIN, 0)
        os.dup2(10, 11)
        os.close(10)

    (words,) = obstacle_words(body)
    assert "it watches a signalfd under number 10, which is no longer open there" in words


# --- inotify ------------------------------------------------------------------------------------------------


def _events(fd: int) -> list[tuple[int, int, str]]:
    data, found = os.read(fd, 4096), []
    while data:
        wd, mask, _cookie, length = struct.unpack_from("iIII", data)
        found.append((wd, mask, data[16 : 16 + length].rstrip(b"\0").decode()))
        data = data[16 + length :]
    return found


def test_inotify_watches_keep_their_numbers(tmp_path: Path) -> None:
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()

    def body() -> None:
        at(10, kernel.inotify_init(os.O_NONBLOCK))
        for name in ("first", "second", "third"):
            kernel.inotify_add_watch(10, str(tmp_path / name), IN_CREATE)
        kernel.inotify_rm_watch(10, 2)
        kernel.inotify_add_watch(10, str(tmp_path / "second"), IN_CREATE | IN_DELETE | IN_ONESHOT)
        os.read(10, 4096)  # IN_IGNORED

    with made_from(body) as fds:
        with pytest.raises(BlockingIOError):
            os.read(fds[10], 4096)  # restoring leaves no events
        for name in ("first", "second", "third"):
            (tmp_path / name / "new").touch()
        events = _events(fds[10])
        assert (1, IN_CREATE, "new") in events
        assert (4, IN_CREATE, "new") in events
        assert (3, IN_CREATE, "new") in events
        (tmp_path / "second" / "again").touch()
        with pytest.raises(BlockingIOError):  # IN_ONESHOT came through
            os.read(fds[10], 4096)


def test_inotify_on_a_file_system_without_handles() -> None:
    def body() -> None:
        at(10, kernel.inotify_init(0))
        kernel.inotify_add_watch(10, "/proc", IN_CREATE)

    with gathered_from(body) as gathered:
        assert gathered.obstacles == []


def test_inotify_with_unread_events(tmp_path: Path) -> None:
    def body() -> None:
        at(10, kernel.inotify_init(0))
        kernel.inotify_add_watch(10, str(tmp_path), IN_CREATE)
        (tmp_path / "new").touch()

    (words,) = obstacle_words(body)
    assert "bytes of file events wait in it" in words
    assert "try again when the program has read them" in words


def test_inotify_on_something_deleted(tmp_path: Path) -> None:
    path = tmp_path / "gone"

    def body() -> None:
        at(11, os.open(path, os.O_CREAT | os.O_RDWR))
        at(10, kernel.inotify_init(0))
        kernel.inotify_add_watch(10, str(path), IN_DELETE)
        path.unlink()

    (words,) = obstacle_words(body)
    assert "watch 1 is on inode" in words
    assert "whose path cannot be found" in words


# --- memfd --------------------------------------------------------------------------------------------------


def test_memfd_is_made_empty_and_sealed_at_the_end() -> None:
    def body() -> None:
        at(10, os.memfd_create("buffer", os.MFD_ALLOW_SEALING))
        os.write(10, b"pages travel elsewhere")
        os.fchmod(10, 0o640)
        fcntl.fcntl(10, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW)
        at(11, os.open("/proc/self/fd/10", os.O_RDONLY))
        at(12, os.memfd_create("plain"))

    with gathered_from(body) as gathered:
        with make_files(checkpoint_of(gathered), open_path=os.open) as done:
            (rows,) = gathered.descriptors.values()
            fds = {row.fd: done.files[row.file_id] for row in rows}
            assert os.readlink(f"/proc/self/fd/{fds[10]}") == "/memfd:buffer (deleted)"
            assert os.fstat(fds[10]).st_ino == os.fstat(fds[11]).st_ino
            assert os.fstat(fds[10]).st_size == len(b"pages travel elsewhere")
            assert os.fstat(fds[10]).st_mode & 0o777 == 0o640
            assert os.lseek(fds[10], 0, os.SEEK_CUR) == len(b"pages travel elsewhere")
            for memory in gathered.shared.values():
                os.pwrite(done.objects[memory.id], b"filled", 0)
                finish_memfd(done.objects[memory.id], memory)
            assert os.pread(fds[11], 6, 0) == b"filled"
            with pytest.raises(PermissionError):
                os.pwrite(fds[10], b"x", 0)
            assert fcntl.fcntl(fds[12], fcntl.F_GET_SEALS) == fcntl.F_SEAL_SEAL
        assert not any(memory.lazy for memory in gathered.shared.values())
        assert sorted(memory.name for memory in gathered.shared.values()) == ["buffer", "plain"]


def test_seals_that_cannot_be_applied_are_named() -> None:
    from lazyproc.errors import RestoreError

    fd = os.memfd_create("sealed")
    try:
        with pytest.raises(RestoreError, match="memfd buffer: cannot be sealed"):
            finish_memfd(fd, SharedMemory(1, kind=None, size=0, name="buffer", seals=fcntl.F_SEAL_WRITE))  # type: ignore[arg-type]
    finally:
        os.close(fd)


# --- signal owners ------------------------------------------------------------------------------------------


def _own(fd: int, kind: int, pid: int, number: int) -> None:
    fcntl.fcntl(fd, 15, struct.pack("ii", kind, pid))  # F_SETOWN_EX
    fcntl.fcntl(fd, kernel.F_SETSIG, number)


def _owned(gathered_files: dict[int, OpenFile]) -> list[OpenFile]:
    return [file for file in gathered_files.values() if file.owner.signal]


def test_signal_owner_becomes_a_row() -> None:
    def body() -> None:
        reading, writing = os.pipe()
        at(10, reading)
        at(11, writing)
        _own(10, kernel.F_OWNER_PID, os.getpid(), signal.SIGRTMIN)
        fcntl.fcntl(10, fcntl.F_SETFL, os.O_ASYNC)
        os.dup2(10, 12)

    with gathered_from(body) as gathered:
        checkpoint = checkpoint_of(gathered)
        vpid = checkpoint.root.vpid
        (file,) = _owned(gathered.files)
        assert (file.owner.pid, file.owner.type, file.owner.signal) == (
            vpid,
            kernel.F_OWNER_PID,
            signal.SIGRTMIN,
        )
        assert owner_rows(checkpoint, checkpoint.root) == [OwnerRow(10, kernel.F_OWNER_PID, vpid)]
        with made(checkpoint) as fds:
            assert fcntl.fcntl(fds[10], kernel.F_GETSIG) == signal.SIGRTMIN
            assert fcntl.fcntl(fds[10], fcntl.F_GETFL) & os.O_ASYNC


def test_signal_owner_outside_of_the_tree() -> None:
    us = os.getpid()

    def body() -> None:
        at(10, os.eventfd(0))
        _own(10, kernel.F_OWNER_PID, us, signal.SIGRTMIN)

    (words,) = obstacle_words(body)
    assert f"fd 10: its signals (F_SETOWN) go to pid {us} outside the tree" in words


def test_epoll_targets_are_in_the_model() -> None:
    def body() -> None:
        _epoll(20)
        at(10, os.eventfd(0))
        kernel.epoll_add(20, 10, select.EPOLLIN, 5)

    with gathered_from(body) as gathered:
        (rows,) = gathered.descriptors.values()
        files = {row.fd: row.file_id for row in rows}
        resource = gathered.files[files[20]].resource
        assert isinstance(resource, Epoll)
        events = select.EPOLLIN | select.EPOLLERR | select.EPOLLHUP
        assert resource.targets == (EpollTarget(10, files[10], events, 5),)
