"""Making netlink(7) sockets again: with the groups and the port that they had, which the program may have noted."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from lazyproc.errors import RestoreError
from lazyproc.facts import dataclass, field
from lazyproc.kernel.sockopt import LATE, NETLINK_ADD_MEMBERSHIP, SOL_NETLINK
from lazyproc.model import NetlinkSocket
from lazyproc.needs import NetlinkNeed
from lazyproc.restore.options import apply

_MASKED = 32  # so many groups fit into an address


@dataclass(slots=True)
class NetlinkSockets:
    """Those of one checkpoint under construction. `made` has them by inode."""

    sockets: Mapping[int, NetlinkSocket]  # by inode
    stack: ExitStack
    made: dict[int, socket.socket] = field(default_factory=dict)

    def make(self) -> None:
        """Raises RestoreError."""
        for netlink in self.sockets.values():
            with _words(netlink.protocol, netlink.port):
                sock = socket.socket(socket.AF_NETLINK, netlink.type, netlink.protocol)
                self.made[netlink.inode] = self.stack.enter_context(sock)
                _make(sock, netlink)
            apply(sock, netlink.options, LATE)


def check_port(need: NetlinkNeed) -> None:
    """Raises RestoreError when somebody has it here."""
    with (
        _words(need.protocol, need.port),
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, need.protocol) as sock,
    ):
        sock.bind((need.port, 0))


def _make(sock: socket.socket, netlink: NetlinkSocket) -> None:
    mask = sum(1 << group - 1 for group in netlink.groups if group <= _MASKED)
    if netlink.port:
        sock.bind((netlink.port, mask))
    for group in netlink.groups:
        if group > _MASKED:
            sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    if any(netlink.remote):
        sock.connect(netlink.remote)


@contextmanager
def _words(protocol: int, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise RestoreError(
            f"{port} is in use by another process" if taken else f"cannot be made: {error.strerror}",
            where=f"netlink socket of protocol {protocol}",
            remedy="end that process, most often the one with that number, or restore in another network namespace"
            if taken
            else "see `lazyproc check`",
        ) from error
