"""A process under construction: its stopped threads, its memory, the bench where its remote calls run."""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import Sequence

from lazyproc.errors import RestoreError
from lazyproc.facts import dataclass, field
from lazyproc.kernel import proc
from lazyproc.kernel.remote import Bench, Call
from lazyproc.kernel.tracee import Memory, Tracee
from lazyproc.model import Task

SCM_MAX_FD = 253  # include/net/scm.h
MSG_CMSG_CLOEXEC = 0x40000000
MSGHDR = struct.Struct("<QIxxxxQQQQixxxx")  # struct user_msghdr
CMSG = struct.Struct("<Qii")


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

    @property
    def pid(self) -> int:
        return self.leader.tid

    def run(self, *calls: Call) -> list[int]:
        """Run calls in the leader."""
        return self.bench.run(self.leader, calls)

    def receive(self, fds: Sequence[int]) -> list[int]:
        """Give the task these descriptors of ours; the numbers they got (lowest free, in order), not close-on-exec."""
        got: list[int] = []
        for start in range(0, len(fds), SCM_MAX_FD):
            got += self._receive(fds[start : start + SCM_MAX_FD])
        return got

    def _receive(self, fds: Sequence[int]) -> list[int]:
        rights = array.array("i", fds)
        self.transport.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        control_size = CMSG.size + 4 * len(fds)
        byte, control = self.bench.room(1), self.bench.room(control_size)
        iov = self.bench.place(struct.pack("<QQ", byte, 1))
        message = self.bench.place(MSGHDR.pack(0, 0, iov, 1, control, control_size, 0))
        self.run(Call("recvmsg", (self.transport_fd, message, socket.MSG_DONTWAIT)))
        length, level, kind = CMSG.unpack(self.memory.read(control, CMSG.size))
        if (length, level, kind) != (control_size, socket.SOL_SOCKET, socket.SCM_RIGHTS):
            raise RestoreError(
                f"only {(length - CMSG.size) // 4} of {len(fds)} descriptors arrived",
                where=f"pid {self.task.vpid}",
                remedy="raise its RLIMIT_NOFILE",
            )
        return list(struct.unpack(f"<{len(fds)}i", self.memory.read(control + CMSG.size, 4 * len(fds))))


def host_tids(pid: int, tids: Sequence[int]) -> dict[int, int]:
    """The threads of `pid` by the number they have in their own pid namespace -> ours."""
    known = {proc.status(proc.read(pid, f"task/{tid}/status")).ns_pid[-1]: tid for tid in proc.task_ids(pid)}
    missing = [tid for tid in tids if tid not in known]
    if missing:
        raise RestoreError(f"threads {missing} are not there", where=f"pid {pid}", remedy="report it")
    return known
