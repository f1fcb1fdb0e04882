"""fdinfo texts of each kind of file, as Linux 6.18 writes them."""

from __future__ import annotations

from lazyproc.kernel.proc_fdinfo import (
    EpollInfo,
    EventFdInfo,
    FdInfo,
    InotifyInfo,
    LockInfo,
    TimerFdInfo,
    fdinfo,
)

COMMON = b"pos:\t4097\nflags:\t02100001\nmnt_id:\t27\nino:\t2146398\n"
BARE = FdInfo(pos=4097, flags=0o2100001, mnt_id=27, inode=2146398)


def test_a_plain_file() -> None:
    assert fdinfo(COMMON) == BARE


def test_lines_of_other_kinds_are_passed_over() -> None:
    assert fdinfo(COMMON + b"iff:\ttap0\ndrm-driver:\ti915\n") == BARE


def test_locks() -> None:
    text = (
        b"lock:\t1: FLOCK  ADVISORY  READ 6102 fe:00:2146398 0 EOF\n"
        b"lock:\t2: POSIX  ADVISORY  WRITE 6102 103:1f:2146398 5 14\n"
        b"lock:\t1: OFDLCK ADVISORY  WRITE -1 fe:00:2146401 7 EOF\n"
        b"lock:\t1: LEASE  ACTIVE    READ 7932 fe:00:2146418 0 EOF\n"
    )
    flock, posix, ofd, lease = fdinfo(COMMON + text).locks
    assert flock == LockInfo("FLOCK", "READ", 6102, (0xFE, 0), 2146398, 0, None)
    assert posix == LockInfo("POSIX", "WRITE", 6102, (0x103, 0x1F), 2146398, 5, 14)
    assert ofd == LockInfo("OFDLCK", "WRITE", -1, (0xFE, 0), 2146401, 7, None)
    assert lease == LockInfo("LEASE", "READ", 7932, (0xFE, 0), 2146418, 0, None)


def test_eventfd_counts_in_hexadecimal() -> None:
    text = b"eventfd-count:               1f\neventfd-id: 13\neventfd-semaphore: 1\n"
    assert fdinfo(COMMON + text).eventfd == EventFdInfo(count=31, id=13, semaphore=True)


def test_epoll() -> None:
    text = (
        b"tfd:        5 events:       1c data: ffffffff00000005  pos:-1 ino:26b4 sdev:f\n"
        b"tfd:       14 events: 80000019 data:                e  pos:10 ino:61 sdev:fe00001\n"
    )
    first, second = fdinfo(COMMON + text).epoll
    assert first == EpollInfo(5, 0x1C, 0xFFFFFFFF00000005, -1, 0x26B4, (0, 15))
    assert second == EpollInfo(14, 0x80000019, 14, 10, 0x61, (254, 1))


def test_timerfd() -> None:
    text = b"clockid: 7\nticks: 3\nsettime flags: 03\nit_value: (9, 998613360)\nit_interval: (1, 2)\n"
    assert fdinfo(COMMON + text).timerfd == TimerFdInfo(7, 3, 3, 9_998_613_360, 1_000_000_002)


def test_signalfd() -> None:
    assert fdinfo(COMMON + b"sigmask:\t8000000000000200\n").signalfd_mask == 1 << 63 | 1 << 9


def test_inotify_is_hexadecimal_throughout() -> None:
    text = (
        b"inotify wd:f ino:3f7e8 sdev:fe00000 mask:100 ignored_mask:0 fhandle-bytes:8 fhandle-type:81 "
        b"f_handle:e8f7030000000000\n"
        b"inotify wd:1 ino:1 sdev:1b mask:fff ignored_mask:0 \n"
    )
    first, second = fdinfo(COMMON + text).inotify
    handle = bytes.fromhex("e8f7030000000000")
    assert first == InotifyInfo(15, 0x3F7E8, (254, 0), 0x100, 0, handle_type=0x81, handle=handle)
    assert second == InotifyInfo(1, 1, (0, 27), 0xFFF, 0, handle_type=None, handle=None)


def test_pidfd_of_a_process_that_was_reaped() -> None:
    assert fdinfo(COMMON + b"Pid:\t-1\nNSpid:\t-1\n").pidfd == -1
