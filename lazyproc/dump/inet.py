"""A TCP or UDP socket as data."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lazyproc.dump.registry import Refused
from lazyproc.dump.tcp import FIN_SENT, ending_error, read_connection, read_ended
from lazyproc.facts import dataclass
from lazyproc.kernel import multicast, tcp
from lazyproc.kernel.netfilter import LOOPBACK, End, Flow, plain
from lazyproc.kernel.netns import namespace_of
from lazyproc.kernel.sockdiag import InetInfo
from lazyproc.kernel.sockopt import (
    IP_PKTINFO,
    IP_RECVORIGDSTADDR,
    IPV6_RECVORIGDSTADDR,
    IPV6_RECVPKTINFO,
    RCV_SHUTDOWN,
    SEND_SHUTDOWN,
    SIOCOUTQ,
    SOL_IP,
    SOL_IPV6,
    TCP_CLOSE,
    TCP_CLOSE_WAIT,
    TCP_CLOSING,
    TCP_ESTABLISHED,
    TCP_LAST_ACK,
    TCP_LISTEN,
)
from lazyproc.model import TIES, InetSocket, Packet, SocketOptions, TcpState, Tie

CONNECTED = {TCP_ESTABLISHED, TCP_CLOSE_WAIT, *FIN_SENT}
FIN_RECEIVED = {TCP_CLOSE_WAIT, TCP_CLOSING, TCP_LAST_ACK}
_SHOW_DESTINATION = (
    (SOL_IP, IP_PKTINFO),
    (SOL_IP, IP_RECVORIGDSTADDR),
    (SOL_IPV6, IPV6_RECVPKTINFO),
    (SOL_IPV6, IPV6_RECVORIGDSTADDR),
)


@dataclass(frozen=True, slots=True)
class Ends:
    """The two ends of a socket, and its TCP_* state; UDP is ESTABLISHED when connected, else CLOSE."""

    protocol: int
    state: int
    local: End
    remote: End | None

    @property
    def is_connection(self) -> bool:
        return self.protocol == socket.IPPROTO_TCP and self.remote is not None

    @property
    def flow(self) -> Flow:
        return Flow(self.protocol, self.local, self.remote)


def ends_of(sock: socket.socket) -> Ends:
    local = _end(sock, sock.getsockname())
    try:
        remote = _end(sock, sock.getpeername())
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        remote = None
    if sock.proto == socket.IPPROTO_TCP:
        return Ends(sock.proto, tcp.info(sock).state, local, remote)
    return Ends(sock.proto, TCP_CLOSE if remote is None else TCP_ESTABLISHED, local, remote)


def _end(sock: socket.socket, address: tuple[str, int]) -> End:
    return socket.inet_pton(sock.family, address[0].partition("%")[0]), address[1]


def gather_inet(
    sock: socket.socket,
    ends: Ends,
    *,
    close: bool,
    tcp_close: bool,
    options: SocketOptions,
    queue: tuple[Packet, ...],
    udp: Mapping[int, InetInfo],
    groups: Sequence[multicast.Group],
    touch: bool,
) -> InetSocket:
    """`close`: the connection becomes one that has ended, with what is unread. Without `touch` a
    connection's state is left out. `tcp_close`: see `ending_error`.

    `udp` is sock_diag's view by inode, the only place that shows a UDP socket's shutdown(2). `groups` are
    those that it may be a member of.
    """
    state, local, remote = ends.state, ends.local, ends.remote
    if close:
        state, local, remote = TCP_CLOSE, (bytes(len(local[0])), 0), None
    interface = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0").decode()
    if queue:
        _refuse_unreachable(local[0], interface, options)
    inode = os.fstat(sock.fileno()).st_ino
    shutdown = udp[inode].shutdown if inode in udp else 0
    connection = None
    if sock.proto == socket.IPPROTO_TCP:
        shutdown = RCV_SHUTDOWN | SEND_SHUTDOWN if close else _tcp_shutdown(sock, state)
        connection = _connection(sock, state, shutdown) if touch else None
    return InetSocket(
        inode=inode,
        family=sock.family,
        type=sock.type,
        protocol=sock.proto,
        state=state,
        local=local,
        remote=remote,
        backlog=tcp.info(sock).backlog if state == TCP_LISTEN else 0,
        shutdown=shutdown,
        options=_without_numbers(options),
        v6only=sock.family == socket.AF_INET6
        and bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)),
        interface=interface,
        tcp=connection,
        queue=queue,
        absent=remote is None and _is_absent(sock, local[0], interface),
        error=ending_error(sock, tcp_close=tcp_close) if has_ended(sock, ends) else 0,
        memberships=tuple(multicast.joined(sock, groups)),
        ties=tuple(_ties(sock, options)),
    )


def _without_numbers(options: SocketOptions) -> SocketOptions:
    return SocketOptions({key: value for key, value in options.values.items() if key not in TIES})


def _ties(sock: socket.socket, options: SocketOptions) -> Iterator[Tie]:
    """Interfaces have other numbers elsewhere."""
    for (level, option), order in TIES.items():
        if number := int.from_bytes(options.values.get((level, option), b""), order):
            try:
                with namespace_of(sock):
                    yield Tie(level, option, socket.if_indextoname(number))
            except OSError:
                raise Refused(
                    "is tied to a network interface that is gone", "let the program open the socket again"
                ) from None


def _is_absent(sock: socket.socket, host: bytes, interface: str) -> bool:
    """Whether no socket can be bound to the address unless it is told to (IP_FREEBIND, ip(7)), as this one was."""
    if not any(host) or host in LOOPBACK.values():
        return False
    with namespace_of(sock), socket.socket(sock.family, socket.SOCK_DGRAM) as probe:
        if interface:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        return _bind_error(probe, socket.inet_ntop(sock.family, host)) == errno.EADDRNOTAVAIL


def _bind_error(sock: socket.socket, host: str) -> int:
    try:
        sock.bind((host, 0))
    except OSError as error:
        return error.errno or 0
    return 0


def _connection(sock: socket.socket, state: int, shutdown: int) -> TcpState | None:
    if state in CONNECTED:
        return read_connection(sock)
    return read_ended(sock) if state == TCP_CLOSE and shutdown else None


def _refuse_unreachable(address: bytes, interface: str, options: SocketOptions) -> None:
    """Unread datagrams are put back over the loopback interface, sent to one address."""
    again = "try again in a moment, or let the program read them first"
    group = address[0] >= 0xE0 if len(address) == 4 else address[0] == 0xFF
    if group or interface:
        raise Refused("holds unread datagrams that came to a group or by one interface", again)
    if not any(address) and any(any(options.values.get(option, b"")) for option in _SHOW_DESTINATION):
        raise Refused(
            "holds unread datagrams whose destination address the program wants to know (IP_PKTINFO)", again
        )


def _tcp_shutdown(sock: socket.socket, state: int) -> int:
    """The FINs of the state; a shutdown(SHUT_RD) sends none and shows only in poll(2), and so does an
    end in both directions, which makes the state CLOSE like that of a socket never used.
    """
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    reading = RCV_SHUTDOWN if any(events & select.POLLRDHUP for _fd, events in poll.poll(0)) else 0
    return reading | (SEND_SHUTDOWN if state in FIN_SENT or (reading and state == TCP_CLOSE) else 0)


def has_ended(sock: socket.socket, ends: Ends) -> bool:
    """Whether it is a TCP connection that has come to its end in both directions."""
    return (
        ends.protocol == socket.IPPROTO_TCP
        and ends.state == TCP_CLOSE
        and bool(_tcp_shutdown(sock, ends.state))
    )


def refuse_state(ends: Ends) -> None:
    if ends.protocol == socket.IPPROTO_TCP and ends.state not in {TCP_CLOSE, TCP_LISTEN, *CONNECTED}:
        raise Refused("is a TCP connection that is being made", "try again in a moment")


def refuse_waiting(
    ends: Ends, tree: set[tuple[End, End]], known: Iterable[InetInfo], *, tcp_close: bool
) -> None:
    """What waits at a listening socket has no descriptor yet: it can be made again only when its other end
    is in the tree (whose connections are (local, remote)) and nothing was sent on it. With `tcp_close` what comes
    from outside is given up.
    """
    for info in known:
        if info.inode or info.state not in CONNECTED or not arrived_at(ends, info.local):
            continue
        mirrored = (plain(info.remote), plain(info.local)) if info.remote else None
        if tcp_close and mirrored not in tree:
            continue
        if mirrored not in tree or info.state != TCP_ESTABLISHED or info.rqueue:
            raise Refused(
                f"holds a connection from {_text(info.remote)} that was not accepted yet",
                "try again in a moment, stop the clients from connecting, or use --tcp-close",
            )


def arrived_at(listener: Ends, local: End) -> bool:
    """Whether a connection with this local address comes from the listening socket, or may."""
    return listener.local[1] == local[1] and (
        not any(listener.local[0]) or plain(listener.local) == plain(local)
    )


def _text(end: End | None) -> str:
    if end is None:
        return "an unknown address"
    family = socket.AF_INET if len(end[0]) == 4 else socket.AF_INET6
    return f"{socket.inet_ntop(family, end[0])} port {end[1]}"


def refuse_unsent(sock: socket.socket) -> None:
    """UDP_CORK and MSG_MORE collect a datagram that nothing can read back; it shows in SIOCOUTQ."""
    if struct.unpack("=i", fcntl.ioctl(sock, SIOCOUTQ, bytes(4))) != (0,):
        raise Refused("holds a datagram that was not sent yet (UDP_CORK, MSG_MORE)", "try again in a moment")
