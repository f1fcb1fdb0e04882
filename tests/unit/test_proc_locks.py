"""/proc/locks, as fs/locks.c writes it."""

from __future__ import annotations

import pytest

from lazyproc.dump.locks import awaited
from lazyproc.errors import UnexpectedProcText
from lazyproc.kernel.proc_fdinfo import LockInfo
from lazyproc.kernel.proc_locks import HeldLock, proc_locks

TEXT = b"""\
1: FLOCK  ADVISORY  WRITE 6102 fe:00:2146398 0 EOF
1: -> FLOCK  ADVISORY  WRITE 6105 fe:00:2146398 0 EOF
1:  -> FLOCK  ADVISORY  READ 6106 fe:00:2146398 0 EOF
2: OFDLCK ADVISORY  WRITE -1 fe:00:2146401 7 EOF
2: -> OFDLCK ADVISORY  WRITE -1 fe:00:2146401 7 9
3: POSIX  ADVISORY  READ 6102 <none>:0 5 14
3: -> POSIX  ADVISORY  WRITE 6107 <none>:0 5 14
4: POSIX  ADVISORY  READ 6102 103:1f:2146398 5 14
"""
FLOCK = LockInfo("FLOCK", "WRITE", 6102, (0xFE, 0), 2146398, 0, None)
OFD = LockInfo("OFDLCK", "WRITE", -1, (0xFE, 0), 2146401, 7, None)
POSIX = LockInfo("POSIX", "READ", 6102, (0x103, 0x1F), 2146398, 5, 14)


def test_who_waits_stands_behind_what_it_waits_for() -> None:
    held = [HeldLock(FLOCK, (6105, 6106)), HeldLock(OFD, (-1,)), HeldLock(POSIX, ())]
    assert proc_locks(TEXT) == held


def test_nothing_is_locked() -> None:
    assert proc_locks(b"") == []


@pytest.mark.parametrize("text", [b"1: FLOCK ADVISORY", b"1:", b"1: FLOCK ADVISORY WRITE x fe:00:1 0 EOF"])
def test_a_line_that_ends_early_is_named(text: bytes) -> None:
    with pytest.raises(UnexpectedProcText, match="/proc/locks"):
        proc_locks(text)


def test_who_waits_and_is_not_inside_is_an_obstacle() -> None:
    table = proc_locks(TEXT)
    assert [each.why.partition(" waits")[0] for each in awaited({FLOCK: (6102, 3)}, table)] == ["pid 6105"]
    assert [each.why.partition(" waits")[0] for each in awaited({OFD: (6102, 4)}, table)] == ["somebody"]
    (against,) = awaited({FLOCK: (6102, 3)}, table, {6105})
    assert (against.pid, against.where, against.remedy) == (6102, "fd 3", "end pid 6106 first")
    assert not [*awaited({FLOCK: (6102, 3), OFD: (6102, 4)}, table, {6105, 6106, -1})]
    assert not [*awaited({POSIX: (6102, 3)}, table)]
