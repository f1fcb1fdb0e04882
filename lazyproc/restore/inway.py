"""What lies where a file of the tree is to be, in the words of who has to decide whether it may go: often it is the
tree's own, left on a tmpfs when it moved away. Nothing here tells that from somebody else's, so nothing is overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from shlex import quote

from lazyproc.errors import LazyprocError, RestoreError
from lazyproc.kernel import proc


def in_the_way(found: Sequence[tuple[str, os.stat_result]]) -> RestoreError:
    """Paths, and what is there."""
    paths = [path for path, _ in found]
    users = sorted({pid for _, status in found for pid in _users(status)})
    who = f"pid {', '.join(map(str, users))}" if users else "nobody"
    command = f"mv {quote(paths[0])} {quote(paths[0] + '.old')}"
    if len(paths) > 1:
        command = f'for f in {" ".join(map(quote, paths))}; do mv "$f" "$f.old"; done'
    return RestoreError(
        f"something else is there on this host, in use by {who}",
        where=f"file {', '.join(paths)}",
        remedy=f"{'when it is no longer in use, ' if users else ''}move it out of the way: {command}",
    )


def _users(status: os.stat_result) -> Iterator[int]:
    """Who has it open or mapped, of those that we may look at; a JVM closes what it has mapped."""
    device = f" {os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x} {status.st_ino} ".encode()
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        with suppress(LazyprocError, OSError):
            if _has_open(pid, status) or device in proc.read(pid, "maps"):
                yield pid


def _has_open(pid: int, status: os.stat_result) -> bool:
    for number in proc.descriptor_numbers(pid):
        with suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), status):
                return True
    return False
