"""/proc/locks: every lock that is held on this host, and who waits for it (fs/locks.c, locks_show).

To read it means to wait for RCU, some 10 ms, unless it has been read within the last 10 (locks_start,
percpu_down_write): so it is read when there is time.
"""

from __future__ import annotations

from lazyproc.facts import dataclass
from lazyproc.kernel.proc import parser
from lazyproc.kernel.proc_fdinfo import LockInfo, lock_info

_WAITS = b"->"


@dataclass(frozen=True, slots=True)
class HeldLock:
    """`lock` is the same as fdinfo has it."""

    lock: LockInfo
    waiting: tuple[int, ...]  # pids of those who wait for it, -1 where that is an open file description


@parser("locks", "/proc")
def proc_locks(data: bytes) -> list[HeldLock]:
    """Who waits stands behind what it waits for, under the same number. What has no inode is passed over."""
    found: list[tuple[LockInfo, list[int]]] = []
    number = b""
    for line in data.splitlines():
        words = line.split()
        if b"<none>" in line:
            continue
        if words[1] != _WAITS:
            number = words[0]
            found.append((lock_info(words[1:]), []))
        elif words[0] == number:
            found[-1][1].append(lock_info(words[2:]).pid)
    return [HeldLock(lock, tuple(waiting)) for lock, waiting in found]


def held_locks() -> list[HeldLock]:
    """Of those whose owner has a number here: what is held or awaited from another pid namespace may not show."""
    return proc_locks(_text())


def awaited_locks() -> list[HeldLock]:
    """Those of them that somebody waits for. Most often there is none, and a file of thousands is not taken apart."""
    text = _text()
    return [held for held in proc_locks(text) if held.waiting] if _WAITS in text else []


def _text() -> bytes:
    with open("/proc/locks", "rb") as file:
        return file.read()
