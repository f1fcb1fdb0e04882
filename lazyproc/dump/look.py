"""What can be seen of one descriptor from outside, and turning a refusal into an obstacle."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from lazyproc.dump.registry import Refused, Registry
from lazyproc.errors import NoSuchProcess
from lazyproc.facts import dataclass
from lazyproc.kernel import fds, proc
from lazyproc.kernel.proc_fdinfo import FdInfo, fdinfo


@dataclass(frozen=True, slots=True)
class Look:
    """A descriptor as /proc shows it."""

    pid: int
    fd: int
    link: str  # what /proc/PID/fd/FD points to: a path of ours, "pipe:[7]", "anon_inode:[eventfd]"
    info: FdInfo

    @property
    def access(self) -> int:
        """O_RDONLY, O_WRONLY or O_RDWR."""
        return self.info.flags & os.O_ACCMODE


def leads_to(link: str) -> str:
    """What a link of /proc points to. Refused where it is longer than the page that do_proc_readlink() has for it."""
    try:
        return os.readlink(link)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise Refused("its path is longer than 4095 bytes", "give folders above it shorter names") from None


def look_at(pid: int, fd: int) -> Look:
    """OSError or NoSuchProcess when it was closed meanwhile."""
    return Look(pid, fd, leads_to(f"/proc/{pid}/fd/{fd}"), fdinfo(proc.read(pid, f"fdinfo/{fd}")))


@contextmanager
def unless_closed(registry: Registry) -> Iterator[None]:
    """Of a running process a descriptor may go while it is looked at; of a frozen one that is an error."""
    try:
        yield
    except (OSError, NoSuchProcess) as error:
        gone = isinstance(error, NoSuchProcess) or fds.is_gone(error)
        if registry.contents_wanted or not gone:
            raise


@contextmanager
def attempt(registry: Registry, pid: int, where: str) -> Iterator[None]:
    """Inside, Refused becomes an obstacle of `pid` at `where` ("fd 7", "mapping 0x..-0x..")."""
    with unless_closed(registry):
        try:
            yield
        except Refused as refused:
            registry.refuse(pid, where, refused)
