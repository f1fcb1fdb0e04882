"""netlink(7) sockets over which a program asks the kernel and hears from it, and for which that keeps nothing else."""

from __future__ import annotations

import select
import socket

from lazyproc.dump.registry import Refused
from lazyproc.kernel.sockopt import NETLINK_LIST_MEMBERSHIPS, NETLINK_LISTEN_ALL_NSID, SOL_NETLINK
from lazyproc.model import NETLINK_PROTOCOLS, NetlinkSocket, SocketOptions

_CLOSE = "close it before the move and open it again after it"
_MOST_GROUPS = 1024  # bytes of NETLINK_LIST_MEMBERSHIPS


def refuse_protocol(sock: socket.socket) -> None:
    """Raise Refused for one that the kernel keeps something for: queues, registrations, tables."""
    if sock.proto not in NETLINK_PROTOCOLS:
        raise Refused(
            f"is a netlink socket of protocol {sock.proto}: what this host's kernel keeps for it cannot be read",
            _CLOSE,
        )
    if sock.getsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID):
        raise Refused("is a netlink socket that listens to other network namespaces", _CLOSE)


def refuse_unread(sock: socket.socket) -> None:
    """Only a kernel can put a message there, or say that some were lost (ENOBUFS)."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if poll.poll(0):
        raise Refused(
            "is a netlink socket with unread messages of this host's kernel", "try again in a moment"
        )


def gather_netlink(sock: socket.socket, inode: int, options: SocketOptions) -> NetlinkSocket:
    port, _groups = sock.getsockname()
    return NetlinkSocket(inode, sock.type, sock.proto, port, _groups_of(sock), sock.getpeername(), options)


def _groups_of(sock: socket.socket) -> tuple[int, ...]:
    """The groups it is a member of, by their numbers, from 1 on."""
    words = sock.getsockopt(SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, _MOST_GROUPS)
    bits = int.from_bytes(words, "little")
    return tuple(bit + 1 for bit in range(bits.bit_length()) if bits >> bit & 1)
