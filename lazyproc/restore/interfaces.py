"""What a socket has of this host's interfaces, which are found by their names."""

from __future__ import annotations

import errno
import os
import socket

from lazyproc.errors import RestoreError
from lazyproc.kernel import multicast
from lazyproc.kernel.sockopt import LATE
from lazyproc.model import TIES, InetSocket, Membership, Tie
from lazyproc.needs import InterfaceNeed
from lazyproc.restore.options import apply


def set_late(sock: socket.socket, inet: InetSocket) -> None:
    """Options, ties and memberships, when the socket is where it was. Raises RestoreError."""
    apply(sock, inet.options, LATE)
    for tie in inet.ties:
        _tie(sock, tie)
    for membership in inet.memberships:
        _join(sock, membership)


def check_interface(need: InterfaceNeed) -> None:
    """Raises RestoreError."""
    _number(need.name)


def _tie(sock: socket.socket, tie: Tie) -> None:
    number = _number(tie.interface)
    value = number.to_bytes(4, TIES[tie.level, tie.option])
    try:
        sock.setsockopt(tie.level, tie.option, value)
    except OSError as error:
        raise RestoreError(
            f"a socket cannot be tied to it ({error.strerror})",
            where=f"interface {tie.interface}",
            remedy="see `ip link`",
        ) from error


def _join(sock: socket.socket, membership: Membership) -> None:
    _number(membership.interface)
    group = socket.inet_ntop(membership.family, membership.address)
    try:
        multicast.join(sock, membership)
    except OSError as error:
        raise RestoreError(
            f"a socket cannot join the multicast group {group} on it ({os.strerror(error.errno or 0)})",
            where=f"interface {membership.interface}",
            remedy="raise net.ipv4.igmp_max_memberships"
            if error.errno == errno.ENOBUFS
            else "see that it is up, with an address of that family",
        ) from error


def _number(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise RestoreError(
            "is not on this host",
            where=f"interface {name}",
            remedy=f"give the one in its place that name, too: ip link property add dev DEVICE altname {name}",
        ) from None
