"""Making all sockets of a checkpoint in the process that restores.

Three stages, since each needs more of the tree: `make_sockets` needs nothing but the host; `fill_queues`
needs all files, which may lie in queues, and the tasks' pids, which stand in credentials; `leave_repair`
comes after the commit, when connections may send.

The code for a kind of sockets is imported when the checkpoint has one of that kind: most start-ups do without.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from socket import socket
from typing import TYPE_CHECKING, TypeVar

from lazyproc.facts import dataclass, replace
from lazyproc.kernel.sockopt import LATE
from lazyproc.model import Checkpoint, InetSocket, NetlinkSocket, OpenFile, UnixSocket
from lazyproc.restore.options import apply
from lazyproc.restore.workshop import OpenPath, finish

if TYPE_CHECKING:
    from lazyproc.kernel.netfilter import Flow
    from lazyproc.restore.creation import Maker
    from lazyproc.restore.inet import InetSockets
    from lazyproc.restore.netlink import NetlinkSockets
    from lazyproc.restore.unix import UnixSockets

S = TypeVar("S", UnixSocket, InetSocket, NetlinkSocket)

_KINDS = (UnixSocket, InetSocket, NetlinkSocket)


@dataclass(slots=True)
class MadeSockets:
    """The sockets of a tree on their way to life; None for a kind it does not have."""

    _unix: UnixSockets | None
    _inet: InetSockets | None

    def fill_queues(self, files: Mapping[int, int], pids: Mapping[int, int]) -> None:
        """Refill unix queues; then shutdown(2) and the options that would have been in the way.

        `files`: file id to our descriptor, all files of the checkpoint; `pids`: vpid to the pid it has for
        us. Raises RestoreError.
        """
        if self._unix is None:
            return
        self._unix.fill(files, pids)
        for unix in self._unix.sockets.values():
            sock = self._unix.made[unix.inode]
            if unix.shutdown:
                sock.shutdown(unix.shutdown - 1)  # SHUT_RD, SHUT_WR, SHUT_RDWR count from 0
            apply(sock, unix.options, LATE)

    def leave_repair(self) -> None:
        """After the commit: TCP connections live, and what they had not sent yet goes out."""
        if self._inet is not None:
            self._inet.leave_repair()


@contextmanager
def make_sockets(
    checkpoint: Checkpoint,
    files: dict[int, int],
    *,
    open_path: OpenPath = os.open,
    maker: Maker | None = None,
) -> Iterator[MadeSockets]:
    """Every socket of the checkpoint that is not in `files` yet (file id to a descriptor of ours), added to them; all
    are closed on leaving.

    `open_path` opens a path from the tree's root directory; `maker` has its tasks, for SO_PEERCRED. TCP
    connections are in repair mode: closing them sends nothing. Raises RestoreError naming the address or the path and
    what to do.
    """
    with ExitStack() as stack:
        checkpoint = replace(checkpoint, files={n: f for n, f in checkpoint.files.items() if n not in files})
        unix, inet = _unix_sockets(checkpoint, open_path, maker, stack), _inet_sockets(checkpoint, stack)
        made: dict[int, socket] = {}
        for kind in (unix, inet, _netlink_sockets(checkpoint, stack)):
            if kind is not None:
                kind.make()
                made |= kind.made
        for file in _socket_files(checkpoint):
            assert isinstance(file.resource, _KINDS)
            files[file.id] = made[file.resource.inode].fileno()
            finish(files[file.id], file)
        yield MadeSockets(unix, inet)


def _unix_sockets(
    checkpoint: Checkpoint, open_path: OpenPath, maker: Maker | None, stack: ExitStack
) -> UnixSockets | None:
    sockets = _by_inode(checkpoint, UnixSocket)
    if not sockets:
        return None
    from lazyproc.restore.peercred import Callers
    from lazyproc.restore.unix import UnixSockets

    return UnixSockets(sockets, open_path, Callers(maker), stack)


def _inet_sockets(checkpoint: Checkpoint, stack: ExitStack) -> InetSockets | None:
    sockets = _by_inode(checkpoint, InetSocket)
    if not sockets:
        return None
    from lazyproc.restore.inet import InetSockets

    return InetSockets(sockets, stack)


def _netlink_sockets(checkpoint: Checkpoint, stack: ExitStack) -> NetlinkSockets | None:
    sockets = _by_inode(checkpoint, NetlinkSocket)
    if not sockets:
        return None
    from lazyproc.restore.netlink import NetlinkSockets

    return NetlinkSockets(sockets, stack)


def _socket_files(checkpoint: Checkpoint) -> list[OpenFile]:
    return [f for f in checkpoint.files.values() if isinstance(f.resource, _KINDS)]


def _by_inode(checkpoint: Checkpoint, kind: type[S]) -> dict[int, S]:
    resources = (file.resource for file in checkpoint.files.values())
    return {resource.inode: resource for resource in resources if isinstance(resource, kind)}


def flows_to_hold(checkpoint: Checkpoint) -> list[Flow]:
    """What the destination holds back (kernel/netfilter) from before `make_sockets` until just before
    `leave_repair`: the connections to outside of the tree.

    Their peers' packets would be answered with RST while there is no socket. One in repair mode takes
    them; and what `leave_repair` sends into a hold is sent again only when TCP's timer runs out (0.2 s
    and more).
    """
    inet = _inet_sockets(checkpoint, ExitStack())
    return [] if inet is None else inet.flows()
