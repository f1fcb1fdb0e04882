"""One exception tree. Every error says what happened, where, and what the user can do."""

from __future__ import annotations

from collections.abc import Callable

from lazyproc.facts import dataclass


class LazyprocError(Exception):
    """Base of everything lazyproc raises on purpose.

    `what` is one clause, `where` names the pid, descriptor, address or file, `remedy` is what the user can do.
    `exit_code` is the command line's (see docs/cli.md): 1 failed and the source runs as before.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where, remedy)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __reduce__(self) -> tuple[Callable[..., LazyprocError], tuple[object, ...]]:
        """As it is, for whoever waits in another process; `__init__` takes other arguments than `args`."""
        return _again, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}; {self.remedy}" if self.remedy else text


def _again(kind: type[LazyprocError], args: tuple[object, ...], state: dict[str, object]) -> LazyprocError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class UsageError(LazyprocError):
    """The call itself is wrong."""

    exit_code = 2


class NoSuchProcess(LazyprocError):
    """The pid does not exist, or the process ended while it was being worked on."""


class PermissionDenied(LazyprocError):
    """The kernel refused: a capability, a uid or a sysctl is missing."""


class UnexpectedProcText(LazyprocError):
    """A file of /proc does not read as proc(5) says; the kernel is newer, or the text was cut short."""


class HostLacks(LazyprocError):
    """This kernel or host lacks something the job needs."""

    exit_code = 3


class TraceeError(LazyprocError):
    """A tracee did not do what was asked of it (a remote syscall failed, it is traced already, it is in D state)."""


class ImageError(LazyprocError):
    """An image is missing, truncated or garbled."""


class ProtocolError(LazyprocError):
    """The peer sent something that the protocol does not allow."""


class ConnectionLost(LazyprocError):
    """The peer is gone or refuses to talk."""


class CannotListen(LazyprocError):
    """The address to listen at cannot be had."""


class RestoreError(LazyprocError):
    """A step of a restore failed; the half-built tree has been killed."""


class PidTaken(RestoreError):
    """A process or thread cannot be made with its number in this pid namespace."""


class Parked(LazyprocError):
    """The work is parked or goes on without this command and can be resumed."""

    exit_code = 4


class LostAfterCommit(LazyprocError):
    """Memory was lost after the hand-over; the counts are in the message."""

    exit_code = 5


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing that cannot be dumped or moved: which process, which descriptor or mapping, why, and the way out."""

    pid: int  # 0: not one process, but a host
    where: str  # "fd 7", "mapping 0x7f00..-0x7f10..", "thread 1234", "process", "host"
    why: str
    remedy: str

    @property
    def place(self) -> str:
        """Whose it is, for people: "pid 12: fd 7"."""
        return f"pid {self.pid}: {self.where}" if self.pid else self.where

    def __str__(self) -> str:
        return f"{self.place}: {self.why}; {self.remedy}"


class CannotBeDone(LazyprocError):
    """Obstacles stand in the way; found before anything was frozen."""

    exit_code = 3

    def __init__(self, obstacles: tuple[Obstacle, ...]) -> None:
        lines = "\n".join(f"  {obstacle}" for obstacle in obstacles)
        super().__init__(f"{len(obstacles)} obstacle(s)\n{lines}")
        self.obstacles = obstacles
