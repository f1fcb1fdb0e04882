"""Making TCP and UDP sockets again, at the addresses they had."""

from __future__ import annotations

import errno
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

from lazyproc.errors import RestoreError
from lazyproc.facts import dataclass, field
from lazyproc.kernel import inject, tcp
from lazyproc.kernel.netfilter import LOOPBACK, End, Flow, plain, within_host
from lazyproc.kernel.sockopt import (
    EARLY,
    IP_FREEBIND,
    LATE,
    RCV_SHUTDOWN,
    SO_MEMINFO,
    SO_RCVBUFFORCE,
    SO_REUSEADDR,
    SO_REUSEPORT,
    SOL_IP,
    SOL_SOCKET,
    TCP_CLOSE,
    TCP_LISTEN,
)
from lazyproc.model import InetSocket, Packet, SocketOptions
from lazyproc.needs import AddressNeed
from lazyproc.restore.interfaces import set_late
from lazyproc.restore.options import apply
from lazyproc.restore.tcp import connect_repaired, end, leave_repair, send_again

_AMPLE = 1 << 28
_MOMENT = 5.0  # seconds for a packet to pass the loopback interface


@dataclass(slots=True)
class InetSockets:
    """The TCP and UDP sockets of one checkpoint under construction. `made` has them by inode."""

    sockets: Mapping[int, InetSocket]  # by inode
    stack: ExitStack
    made: dict[int, socket.socket] = field(default_factory=dict)
    _connections: set[tuple[End, End]] = field(init=False)  # (local, remote) as on the wire
    _listeners: list[InetSocket] = field(init=False)
    _binders: dict[tuple[int, int], list[InetSocket]] = field(init=False)  # by protocol and port

    def __post_init__(self) -> None:
        tcps = [inet for inet in self.sockets.values() if inet.protocol == socket.IPPROTO_TCP]
        self._connections = {(plain(inet.local), plain(inet.remote)) for inet in tcps if inet.remote}
        self._listeners = [inet for inet in tcps if inet.state == TCP_LISTEN]
        self._binders = defaultdict(list)
        for inet in filter(_minds_others, self.sockets.values()):
            self._binders[inet.protocol, inet.local[1]].append(inet)

    def make(self) -> None:
        """All sockets; connections stay in repair mode. Listening ones come first: a connection in repair
        mode binds next to anything, but nothing binds next to it.
        """
        for inet in sorted(self.sockets.values(), key=lambda inet: inet.tcp is not None):
            with _words(inet, inet.local):
                self._make(inet)
        for inet in self.sockets.values():
            for option in self._only_for_bind(inet):
                self.made[inet.inode].setsockopt(*option, _is_set(inet, option))

    def leave_repair(self) -> None:
        for inet in self.sockets.values():
            if self._is_repaired(inet):
                leave_repair(self.made[inet.inode], inet)

    def flows(self) -> list[Flow]:
        """The connections to outside of the tree."""
        return [
            Flow(inet.protocol, inet.local, inet.remote)
            for inet in self.sockets.values()
            if inet.remote and self._is_repaired(inet) and not self._is_inside(inet)
        ]

    def _make(self, inet: InetSocket) -> None:
        sock = self.stack.enter_context(_new(inet, inet.options))
        self.made[inet.inode] = sock
        if self._is_repaired(inet):
            self._make_connection(sock, inet)
        elif inet.tcp is not None and inet.state == TCP_CLOSE:
            _make_ended(sock, inet)
        else:
            for option in self._only_for_bind(inet):
                sock.setsockopt(*option, True)
            _make_other(sock, inet)

    def _only_for_bind(self, inet: InetSocket) -> list[tuple[int, int]]:
        """What bind(2) has to be allowed, and the program has taken back since: to have an address that is not here,
        to have the port that another socket of the tree has.
        """
        binders = self._binders[inet.protocol, inet.local[1]] if _minds_others(inet) else ()
        others = [other for other in binders if other is not inet and _collide(inet, other)]
        sharing = [inet, *others]
        share = SOL_SOCKET, SO_REUSEPORT
        if inet.protocol == socket.IPPROTO_UDP and not any(_is_set(each, share) for each in sharing):
            share = SOL_SOCKET, SO_REUSEADDR
        needs_share = bool(others) and not all(_is_set(each, share) for each in sharing)
        return [(SOL_IP, IP_FREEBIND)] * inet.absent + [share] * needs_share

    @staticmethod
    def _make_connection(sock: socket.socket, inet: InetSocket) -> None:
        assert inet.remote is not None
        tcp.enter(sock)
        sock.bind(address(inet, inet.local))
        connect_repaired(sock, inet, address(inet, inet.remote))
        if inet.shutdown & RCV_SHUTDOWN:
            _shut_down(sock, socket.SHUT_RD)

    def _is_repaired(self, inet: InetSocket) -> bool:
        return inet.tcp is not None and inet.state != TCP_CLOSE and not self._is_waiting(inet)

    def _is_waiting(self, inet: InetSocket) -> bool:
        """A connection to a listening socket of the tree that nobody has accepted: its other end is in
        no table.
        """
        if inet.remote is None or inet.protocol != socket.IPPROTO_TCP or self._is_inside(inet):
            return False
        return within_host(inet.local, inet.remote) and any(
            _reaches(listener, inet.remote) for listener in self._listeners
        )

    def _is_inside(self, inet: InetSocket) -> bool:
        """Whether the other end of a connection is in the tree."""
        return inet.remote is not None and (plain(inet.remote), plain(inet.local)) in self._connections


def _is_set(inet: InetSocket, option: tuple[int, int]) -> bool:
    return any(inet.options.values.get(option, b""))


def _minds_others(inet: InetSocket) -> bool:
    """Whether it wants a port for itself. A TCP connection, which nobody minds, does not."""
    return inet.local[1] != 0 and not (inet.protocol == socket.IPPROTO_TCP and (inet.remote or inet.tcp))


def _collide(one: InetSocket, other: InetSocket) -> bool:
    """Whether two that want the same port for themselves want it of the same address."""
    if one.family != other.family and (one.v6only or other.v6only):
        return False
    hosts = plain(one.local)[0], plain(other.local)[0]
    return not all(map(any, hosts)) or hosts[0] == hosts[1]


def _new(inet: InetSocket | AddressNeed, options: SocketOptions) -> socket.socket:
    """With the options that decide what bind(2) takes."""
    sock = socket.socket(inet.family, inet.type, inet.protocol)
    try:
        apply(sock, options, EARLY)
        if inet.interface:
            sock.setsockopt(SOL_SOCKET, socket.SO_BINDTODEVICE, inet.interface.encode())
    except BaseException:
        sock.close()
        raise
    return sock


def check_address(need: AddressNeed) -> None:
    """Raise RestoreError unless a socket can have the address and port; one is bound to it for a moment.

    TCP does not listen, so nobody can connect to it; UDP loses what it gets just then.
    """
    options = SocketOptions({(level, name): value for level, name, value in need.options})
    local = need.address, need.port
    with _words(need, local), _new(need, options) as sock:
        sock.bind(address(need, local))
        apply(sock, options, LATE)


def _make_ended(sock: socket.socket, inet: InetSocket) -> None:
    """Repair mode for bind(2): a listening socket may have the port, whose connections share it."""
    assert inet.tcp is not None
    if any(inet.local[0]):
        with tcp.repaired(sock):
            sock.bind(address(inet, inet.local))
    end(sock, inet.tcp.recv_queue, inet.error)
    set_late(sock, inet)


def _make_other(sock: socket.socket, inet: InetSocket) -> None:
    if inet.local[1]:
        sock.bind(address(inet, inet.local))
    if inet.state == TCP_LISTEN:
        sock.listen(inet.backlog)
    _fill(sock, inet)
    if inet.remote is not None:
        sock.settimeout(_MOMENT)
        sock.connect(address(inet, inet.remote))
        sock.settimeout(None)
    if inet.tcp is not None:  # what has not come to the one that nobody has accepted: the rest is an obstacle
        send_again(sock, inet.tcp.send_queue)
    set_late(sock, inet)
    if inet.shutdown:
        _shut_down(sock, inet.shutdown - 1)  # SHUT_RD, SHUT_WR, SHUT_RDWR count from 0


def _fill(sock: socket.socket, inet: InetSocket) -> None:
    """Datagrams, each from its sender's address, before the socket is connected to one sender only."""
    if inet.queue:
        sock.setsockopt(SOL_SOCKET, SO_RCVBUFFORCE, _AMPLE)
    for packet in inet.queue:
        sender = _sender(packet)
        before = _memory(sock)
        inject.datagram(sender, _target(inet, sender), packet.data)
        deadline = time.monotonic() + _MOMENT
        while _memory(sock) == before:
            if time.monotonic() > deadline:
                raise RestoreError(
                    "an unread datagram cannot be put back",
                    where=_text(inet, inet.local),
                    remedy="let the host's firewall accept packets on the loopback interface",
                )
            time.sleep(0.0005)


def _memory(sock: socket.socket) -> int:
    """SK_MEMINFO_RMEM_ALLOC: bytes that the receive queue takes; an empty datagram counts too."""
    return int.from_bytes(sock.getsockopt(SOL_SOCKET, SO_MEMINFO, 4), "little")


def _sender(packet: Packet) -> End:
    """From struct sockaddr_in or sockaddr_in6; ::ffff:a.b.c.d is IPv4 on the wire."""
    port = int.from_bytes(packet.sender[2:4], "big")
    host = packet.sender[4:8] if len(packet.sender) == 16 else packet.sender[8:24]
    return plain((host, port))


def _target(inet: InetSocket, sender: End) -> End:
    """The socket's own address, or the loopback address when it listens on all."""
    host, port = plain(inet.local)
    return host if any(host) else LOOPBACK[len(sender[0])], port


def _reaches(listener: InetSocket, target: End) -> bool:
    port_is_same = listener.local[1] == target[1]
    return port_is_same and (not any(listener.local[0]) or plain(listener.local) == plain(target))


def address(inet: InetSocket | AddressNeed, where: End) -> tuple[str, int] | tuple[str, int, int, int]:
    """As Python's bind and connect take it; a link-local IPv6 address needs its interface."""
    host = socket.inet_ntop(inet.family, where[0])
    if inet.family != socket.AF_INET6:
        return host, where[1]
    link_local = where[0][0] == 0xFE and where[0][1] & 0xC0 == 0x80
    return host, where[1], 0, socket.if_nametoindex(inet.interface) if link_local and inet.interface else 0


def _shut_down(sock: socket.socket, how: int) -> None:
    with suppress(OSError):  # ENOTCONN, after having done it (inet_shutdown)
        sock.shutdown(how)


def _text(inet: InetSocket | AddressNeed, local: End) -> str:
    host, port = address(inet, local)[:2]
    protocol = "TCP" if inet.protocol == socket.IPPROTO_TCP else "UDP"
    return f"{protocol} {host} port {port}" if port else f"{protocol} {host}"


@contextmanager
def _words(inet: InetSocket | AddressNeed, local: End) -> Iterator[None]:
    host = address(inet, local)[0]
    try:
        yield
    except OSError as error:
        what, remedy = f"cannot be made again ({error.strerror})", "see `lazyproc check`"
        if error.errno == errno.EADDRINUSE:
            what, remedy = "is in use on this host", f"stop what holds it: ss -lntup src {host}"
        elif error.errno == errno.EADDRNOTAVAIL:
            what = "has an address that is not on this host, or its connection is still on it"
            remedy = f"give this host the address first: ip address add {host} dev INTERFACE"
        elif error.errno == errno.EPERM:
            remedy = "run as root (CAP_NET_ADMIN, CAP_NET_RAW)"
        raise RestoreError(what, where=_text(inet, local), remedy=remedy) from error
