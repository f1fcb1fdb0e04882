"""A process under construction: its stopped threads, its memory, the bench where its remote calls run."""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lazyproc.errors import RestoreError, TraceeError
from lazyproc.facts import dataclass, field
from lazyproc.kernel import proc
from lazyproc.kernel.remote import Bench, Call
from lazyproc.kernel.tracee import Memory, Tracee
from lazyproc.model import FileLock, Task

SCM_MAX_FD = 253  # include/net/scm.h
MSG_CMSG_CLOEXEC = 0x40000000
MSGHDR = struct.Struct("<QIxxxxQQQQixxxx")  # struct user_msghdr
CMSG = struct.Struct("<Qii")
_FLAGS_AT, _NOT_CALLED = 48, b"\xff\xff\xff\xff"  # msg_flags, which recvmsg(2) only writes


class _Arrival(NamedTuple):
    """Descriptors that a recvmsg(2) brings: where its struct msghdr and its control message lie, the `numbers` they
    are to have.
    """

    message: int
    control: int
    numbers: Sequence[int]


@dataclass(slots=True)
class Site:
    """One task of the checkpoint on its way to life. `pid` is its number in our pid namespace."""

    task: Task
    leader: Tracee
    pidfd: int
    memory: Memory
    bench: Bench
    transport: socket.socket
    transport_fd: int
    threads: dict[int, Tracee] = field(default_factory=dict)  # by tid as the task sees it
    anchor: int = -1  # number of the userfaultfd in the task's own descriptor table
    ledger: int = -1  # of the pager's ledger there
    cradle: int = -1  # and of its cradle
    regions: array.array[int] = field(
        default_factory=lambda: array.array("Q")
    )  # lazy memory, as a pager takes it
    awaited: list[FileLock] = field(default_factory=list)  # locks that somebody else has, as yet
    _late: list[Call] = field(default_factory=list)
    _checks: list[tuple[int, int, Callable[[list[int]], None]]] = field(default_factory=list)
    _arrivals: list[_Arrival] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.leader.tid

    def run(self, *calls: Call) -> list[int]:
        """Run calls in the leader, behind those that were put off."""
        late, checks, arrivals = self._late, self._checks, self._arrivals
        self._late, self._checks, self._arrivals = [], [], []
        if not (late or calls):
            return []
        try:
            results = self.bench.run(self.leader, [*late, *calls])
        except TraceeError:  # it may be that what it works on has not arrived
            self._demand_arrived([arrival for arrival in arrivals if self._was_called(arrival)])
            raise
        self._demand_arrived(arrivals)
        for start, count, check in checks:
            check(results[start : start + count])
        return results[len(late) :]

    def run_later(self, *calls: Call, check: Callable[[list[int]], None] | None = None) -> None:
        """Calls that the next `run` makes first: each stop of a process costs as much as a hundred calls. `check` sees
        what they returned.
        """
        if check is not None:
            self._checks.append((len(self._late), len(calls), check))
        self._late += calls

    def receive(self, fds: Sequence[int]) -> list[int]:
        """Give the task these descriptors of ours; the numbers they got (lowest free, in order), not close-on-exec."""
        got: list[int] = []
        for part in _parts(fds):
            control = self._receive(part)[1]
            self.run()
            got += self._arrived(control, len(part))
        return got

    def receive_later(self, fds: Sequence[int], numbers: Sequence[int]) -> None:
        """The same by the next `run`, where it is known which are the lowest free `numbers`. No other task may be given
        any before: all have one socket.
        """
        for part, expected in zip(_parts(fds), _parts(numbers), strict=True):
            self._arrivals.append(_Arrival(*self._receive(part), expected))

    def _receive(self, fds: Sequence[int]) -> tuple[int, int]:
        """Put the recvmsg(2) off; where its struct msghdr and its control message will lie."""
        rights = array.array("i", fds)
        self.transport.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        control_size = CMSG.size + 4 * len(fds)
        byte, control = self.bench.room(1), self.bench.room(control_size)
        iov = self.bench.place(struct.pack("<QQ", byte, 1))
        message = self.bench.place(MSGHDR.pack(0, 0, iov, 1, control, control_size, -1))
        self.run_later(Call("recvmsg", (self.transport_fd, message, socket.MSG_DONTWAIT)))
        return message, control

    def _was_called(self, arrival: _Arrival) -> bool:
        """Whether the last run has come as far as its recvmsg(2), and that has succeeded."""
        return self.bench.read(arrival.message + _FLAGS_AT, 4) not in (b"", _NOT_CALLED)

    def _arrived(self, control: int, count: int) -> list[int]:
        length, level, kind = CMSG.unpack(self.bench.read(control, CMSG.size))
        if (length, level, kind) != (CMSG.size + 4 * count, socket.SOL_SOCKET, socket.SCM_RIGHTS):
            raise RestoreError(
                f"only {max(0, length - CMSG.size) // 4} of {count} descriptors arrived",
                where=f"pid {self.task.vpid}",
                remedy="raise its RLIMIT_NOFILE",
            )
        return list(struct.unpack(f"<{count}i", self.bench.read(control + CMSG.size, 4 * count)))

    def _demand_arrived(self, arrivals: Sequence[_Arrival]) -> None:
        for _, control, numbers in arrivals:
            if self._arrived(control, len(numbers)) != list(numbers):
                raise RestoreError(
                    "its descriptor table was not empty", where=f"pid {self.task.vpid}", remedy="report it"
                )


def _parts(numbers: Sequence[int]) -> list[Sequence[int]]:
    return [numbers[start : start + SCM_MAX_FD] for start in range(0, len(numbers), SCM_MAX_FD)]


def host_tids(pid: int, tids: Sequence[int]) -> dict[int, int]:
    """The threads of `pid` by the number they have in their own pid namespace -> ours."""
    known = {proc.status(proc.read(pid, f"task/{tid}/status")).ns_pid[-1]: tid for tid in proc.task_ids(pid)}
    missing = [tid for tid in tids if tid not in known]
    if missing:
        raise RestoreError(f"threads {missing} are not there", where=f"pid {pid}", remedy="report it")
    return known
