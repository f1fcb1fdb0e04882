"""The sockets of a tree: what they are, which cannot travel and why, and how they belong together.

Descriptors hand every socket to a `SocketTable` while they go through the tree. `explain` uses the same
table on running processes and asks only for the obstacles, which touches no socket's state; after the freeze
the queues are read too (without consuming them), which may bring up more files: those sent along in
messages.
"""

from __future__ import annotations

import os
import select
import socket
from functools import cached_property
from types import TracebackType

from lazyproc.dump.inet import (
    FIN_RECEIVED,
    Ends,
    arrived_at,
    ends_of,
    gather_inet,
    has_ended,
    refuse_state,
    refuse_unsent,
    refuse_waiting,
)
from lazyproc.dump.netlink import gather_netlink, refuse_protocol, refuse_unread
from lazyproc.dump.peek import read_queue
from lazyproc.dump.pending import hides_queue
from lazyproc.dump.registry import Place, Refused, Registry
from lazyproc.dump.unix import UnixNamespace, gather_unix, has_peer, holds_data, view
from lazyproc.facts import dataclass, field
from lazyproc.kernel import multicast, netns, sockdiag, tcp
from lazyproc.kernel.netfilter import End, Flow, is_loopback, plain, within_host
from lazyproc.kernel.sockopt import (
    IPPROTO_MPTCP,
    SO_ATTACH_FILTER,
    SOL_SOCKET,
    SOL_TCP,
    TCP_LISTEN,
    TCP_ULP,
    classic_filter,
    read_options,
)
from lazyproc.model import InetSocket, NetlinkSocket, Packet, SocketOptions, UnixSocket

_CLOSE = "close it before the move and open it again after it"
# socket(2) and linux/socket.h; numbers because Python does not know them all.
_FAMILIES = {
    17: ("a packet socket on this host's network interfaces", _CLOSE),
    21: ("an RDS socket", _CLOSE),
    29: ("a CAN bus socket", _CLOSE),
    30: ("a TIPC socket", _CLOSE),
    31: ("a Bluetooth socket", _CLOSE),
    38: ("a socket of the kernel's crypto API (AF_ALG)", _CLOSE),
    40: ("a vsock socket between a virtual machine and its host", _CLOSE),
    43: ("an SMC socket", "start the program without smc_run, so that it uses TCP"),
    44: ("an XDP socket on this host's network interfaces", _CLOSE),
}
_PROTOCOLS = {
    socket.IPPROTO_ICMP: ("an ICMP (ping) socket", _CLOSE),
    socket.IPPROTO_ICMPV6: ("an ICMPv6 (ping) socket", _CLOSE),
    socket.IPPROTO_SCTP: ("an SCTP socket, whose state cannot be read", _CLOSE),
    socket.IPPROTO_UDPLITE: ("a UDP-Lite socket", "use UDP"),
    IPPROTO_MPTCP: ("a Multipath TCP socket, whose state cannot be read", "let the program use plain TCP"),
}
_ONLY_ROOT = Refused("is a socket that only root may look into", "run as root (CAP_NET_ADMIN)")
_NOT_PERMITTED = Refused(
    "is an established TCP connection, which was not asked for", "say that they are to be kept, or closed"
)
_INET = (socket.AF_INET, socket.AF_INET6)
_UNIX_TYPES = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)


@dataclass(slots=True)
class _Taken:
    place: Place
    sock: socket.socket
    ends: Ends | None  # of TCP and UDP
    filter: bytes = b""
    queue: tuple[Packet, ...] | None = None


class _Known:
    """sock_diag's view of the sockets' network namespace, each part asked for when it is first needed."""

    def __init__(self, example: socket.socket) -> None:
        self._example = example

    @cached_property
    def unix(self) -> UnixNamespace:
        with netns.namespace_of(self._example):
            return view(sockdiag.unix_sockets())

    @cached_property
    def udp(self) -> dict[int, sockdiag.InetInfo]:
        return {info.inode: info for info in self._inet(socket.IPPROTO_UDP)}

    @cached_property
    def groups(self) -> tuple[multicast.Group, ...]:
        return multicast.groups(self._example)

    @cached_property
    def tcp(self) -> tuple[sockdiag.InetInfo, ...]:
        return self._inet(socket.IPPROTO_TCP)

    def _inet(self, protocol: int) -> tuple[sockdiag.InetInfo, ...]:
        with netns.namespace_of(self._example):
            return tuple(info for family in _INET for info in sockdiag.inet_sockets(family, protocol))


@dataclass(slots=True)
class SocketTable:
    """Duplicates of all sockets of a tree. A context manager: leaving it closes the duplicates.

    With `tcp_close` connections to outside of the tree become connections that have ended: what arrived
    can be read. Those that nobody has accepted yet are not there at all.
    """

    registry: Registry
    tcp_close: bool = False
    _taken: dict[int, _Taken] = field(default_factory=dict)  # by inode
    _messages: list[int] = field(default_factory=list)  # descriptors of ours that were found in queues
    _inodes: set[int] = field(default_factory=set)  # those that cannot travel too
    # Both ends of the TCP connections, as they are on the wire: (local, remote).
    _connections: set[tuple[End, End]] = field(default_factory=set)
    _listening: list[Ends] = field(default_factory=list)  # TCP

    def __enter__(self) -> SocketTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for taken in self._taken.values():
            taken.sock.close()
        for fd in self._messages:
            os.close(fd)

    def add(self, place: Place, fd: int) -> None:
        """Note the socket behind `fd`, a descriptor of ours that is duplicated. A socket that cannot travel
        becomes an obstacle at once.
        """
        sock = socket.socket(fileno=os.dup(fd))
        inode = os.fstat(fd).st_ino
        self._inodes.add(inode)
        try:
            refuse_kind(sock)
            self._same_namespace(sock)
            refuse_urgent(sock)
            hides_queue(sock)
            ends = ends_of(sock) if sock.family in _INET else None
            if ends is not None:
                refuse_state(ends)
            if self.registry.contents_wanted:
                _refuse_under_way(sock)
            self._taken[inode] = _Taken(place, sock, ends, _filter(sock))
        except Refused as refused:
            sock.close()
            self._refuse(place, refused)
            return
        if ends is not None and ends.is_connection and ends.remote:
            self._connections.add((plain(ends.local), plain(ends.remote)))
        if ends is not None and ends.state == TCP_LISTEN:
            self._listening.append(ends)

    def flows(self) -> list[Flow]:
        """What has to be held back (kernel/netfilter) before the queues are read: every bound TCP and UDP
        socket, but for what is given up.
        """
        return [ends.flow for ends in self._bound() if not self._is_given_up(ends)]

    def early_flows(self) -> list[Flow]:
        """What may be held back while the tree still runs: TCP with the outside, which sends again what was
        dropped. A dropped datagram is lost, and its sender sees EPERM; between two ends in the tree TCP would stall,
        and so it would without the packets of the listening socket from which one of them comes, or will come.
        """
        remotes = [remote for _local, remote in self._connections]

        def may_be_within(ends: Ends) -> bool:
            if ends.remote is not None:
                return self._is_inside(ends) or self._has_come_to_the_tree(ends)
            return is_loopback(ends.local) or any(arrived_at(ends, remote) for remote in remotes)

        return [
            ends.flow
            for ends in self._bound()
            if ends.protocol == socket.IPPROTO_TCP and not self._is_given_up(ends) and not may_be_within(ends)
        ]

    def outside_flows(self) -> list[Flow]:
        """The connections that travel and whose other end no process of the tree has."""
        return [
            ends.flow
            for ends in self._bound()
            if ends.is_connection and not self._is_inside(ends) and not self._is_given_up(ends)
        ]

    def connections(self) -> list[socket.socket]:
        """The TCP connections that travel, for `lazyproc.dump.tcp.silence` after the hand-over."""
        inet = ((taken.sock, taken.ends) for taken in self._taken.values() if taken.ends)
        return [sock for sock, ends in inet if ends.is_connection and not self._is_given_up(ends)]

    def given_up(self) -> list[socket.socket]:
        """The TCP connections that do not, and the listening sockets, for `lazyproc.dump.tcp.hang_up` then."""
        inet = ((taken.sock, taken.ends) for taken in self._taken.values() if taken.ends)
        return [sock for sock, ends in inet if self._is_given_up(ends)]

    def read_queues(self) -> None:
        """Read the queues not read yet. New files found in messages are put on the registry's queue, and
        those of them that are sockets have to be added, so call it again until nothing new turns up.
        """
        for taken in list(self._taken.values()):
            if taken.queue is None:
                taken.queue = self._queue(taken)

    def _queue(self, taken: _Taken) -> tuple[Packet, ...]:
        try:
            if not _has_queue(taken.sock) or hides_queue(taken.sock):
                return ()
        except Refused as refused:  # it has come since
            self._refuse(taken.place, refused)
            return ()
        return read_queue(taken.sock, self._intern, self.registry.vpid)

    def resolve(self) -> dict[int, UnixSocket | InetSocket | NetlinkSocket]:
        """Every socket by file id, but for those that cannot travel, which become obstacles of the registry.

        Nothing of a socket's state is touched when the registry wants no contents (`explain`).
        """
        if not self._taken:
            return {}
        known = _Known(next(iter(self._taken.values())).sock)
        resources = {}
        for taken in self._taken.values():
            try:
                resources[taken.place.file_id] = self._resource(taken, known)
            except Refused as refused:
                self._refuse(taken.place, refused)
            except PermissionError:
                self._refuse(taken.place, _ONLY_ROOT)
        return resources

    def _resource(self, taken: _Taken, known: _Known) -> UnixSocket | InetSocket | NetlinkSocket:
        queue, ends = taken.queue or (), taken.ends
        self.registry.unread |= taken.queue is None and ends is None and holds_data(taken.sock)
        if ends is not None and ends.is_connection and not self._is_permitted(ends):
            raise _NOT_PERMITTED
        if ends is not None and ends.is_connection:
            self._refuse_half_gone(taken, ends)
        connected = ends is not None and (ends.is_connection or has_ended(taken.sock, ends))
        values = read_options(taken.sock, connected=connected)
        options = SocketOptions(
            values | ({(SOL_SOCKET, SO_ATTACH_FILTER): taken.filter} if taken.filter else {})
        )
        if taken.sock.family == socket.AF_NETLINK:
            return gather_netlink(taken.sock, os.fstat(taken.sock.fileno()).st_ino, options)
        if ends is None:
            return gather_unix(self.registry, taken.sock, known.unix, self._inodes, options, queue)
        if ends.state == TCP_LISTEN and tcp.info(taken.sock).pending:
            refuse_waiting(ends, self._connections, known.tcp, tcp_close=self.tcp_close)
        return gather_inet(
            taken.sock,
            ends,
            close=ends.is_connection and self._is_given_up(ends),
            tcp_close=self.tcp_close,
            options=options,
            queue=queue,
            udp=known.udp if ends.protocol == socket.IPPROTO_UDP else {},
            groups=known.groups if ends.protocol == socket.IPPROTO_UDP else (),
            touch=self.registry.contents_wanted,
        )

    def _is_inside(self, ends: Ends) -> bool:
        """Whether the other end of a connection is in the tree."""
        return ends.remote is not None and (plain(ends.remote), plain(ends.local)) in self._connections

    def _has_come_to_the_tree(self, ends: Ends) -> bool:
        """Whether a connection was made to a listening socket of the tree, whatever has become of its other end."""
        remote = ends.remote
        return remote is not None and (
            within_host(ends.local, remote) and any(arrived_at(each, remote) for each in self._listening)
        )

    def _is_given_up(self, ends: Ends) -> bool:
        """With `tcp_close` TCP with the outside; a listening socket with everything that waits there. And what the tree
        itself has closed at the other end: all that this has sent is here.
        """
        if ends.protocol != socket.IPPROTO_TCP or self._is_inside(ends):
            return False
        return self.tcp_close or (ends.state in FIN_RECEIVED and self._has_come_to_the_tree(ends))

    def _refuse_half_gone(self, taken: _Taken, ends: Ends) -> None:
        """Who has not accepted sends nothing: what has come is from an end that was closed, and its FIN is on its way,
        perhaps with more.
        """
        if self._is_inside(ends) or self._is_given_up(ends) or not self._has_come_to_the_tree(ends):
            return
        unread, _, _ = tcp.queued(taken.sock)
        if unread:
            raise Refused(
                "is a TCP connection that another process of the tree has just closed",
                "try again in a moment",
            )

    def _is_permitted(self, connection: Ends) -> bool:
        return self.registry.permits.connections or (self.tcp_close and not self._is_inside(connection))

    def _bound(self) -> list[Ends]:
        return [taken.ends for taken in self._taken.values() if taken.ends and taken.ends.local[1]]

    def _intern(self, fd: int) -> int:
        self._messages.append(fd)
        return self.registry.intern(os.getpid(), fd)[0]

    def _same_namespace(self, sock: socket.socket) -> None:
        other = next(iter(self._taken.values()), None)
        if other is not None and netns.cookie(other.sock) != netns.cookie(sock):
            raise Refused(
                "is in another network namespace than the tree's other sockets",
                "start the whole tree in one network namespace",
            )

    def _refuse(self, place: Place, refused: Refused) -> None:
        self.registry.refuse(place.pid, f"fd {place.fd}", refused)


def _has_queue(sock: socket.socket) -> bool:
    """TCP's queues are part of the connection; a listening socket has connections instead."""
    if sock.family in _INET:
        return sock.type == socket.SOCK_DGRAM
    if sock.family == socket.AF_NETLINK:
        return False
    return sock.type == socket.SOCK_DGRAM or has_peer(sock)


def refuse_kind(sock: socket.socket) -> None:
    """Raise Refused for every kind of socket that is not unix, TCP, UDP or netlink."""
    if sock.family == socket.AF_UNIX and sock.type in _UNIX_TYPES:
        return
    if sock.family == socket.AF_NETLINK:
        refuse_protocol(sock)
        return
    if sock.family in _INET:
        if sock.type == socket.SOCK_RAW:
            raise Refused("is a raw IP socket", _CLOSE)
        if (sock.type, sock.proto) == (socket.SOCK_DGRAM, socket.IPPROTO_UDP):
            return
        if (sock.type, sock.proto) == (socket.SOCK_STREAM, socket.IPPROTO_TCP):
            _refuse_ulp(sock)
            return
        why, remedy = _PROTOCOLS.get(sock.proto, (f"an IP socket of protocol {sock.proto}", _CLOSE))
    else:
        why, remedy = _FAMILIES.get(sock.family, (f"a socket of address family {int(sock.family)}", _CLOSE))
    raise Refused(f"is {why}", remedy)


def _refuse_under_way(sock: socket.socket) -> None:
    if sock.family == socket.AF_NETLINK:
        refuse_unread(sock)
    elif sock.family in _INET and sock.proto == socket.IPPROTO_UDP:
        refuse_unsent(sock)


def _refuse_ulp(sock: socket.socket) -> None:
    layer = sock.getsockopt(SOL_TCP, TCP_ULP, 16).rstrip(b"\0").decode(errors="replace")
    if layer:
        raise Refused(f"has the kernel's {layer} layer on top of TCP, whose keys cannot be read", _CLOSE)


def refuse_urgent(sock: socket.socket) -> None:
    """MSG_OOB data cannot be peeked in its place; on a stream it shows in poll(2)."""
    if sock.type != socket.SOCK_STREAM:
        return
    poll = select.poll()
    poll.register(sock, select.POLLPRI)
    if any(events & select.POLLPRI for _fd, events in poll.poll(0)):
        raise Refused("holds urgent (MSG_OOB) data", "let the program read it first")


def _filter(sock: socket.socket) -> bytes:
    try:
        return classic_filter(sock)
    except PermissionError:
        raise Refused(
            "has an eBPF filter attached, which cannot be read back", "detach it, or use a classic BPF filter"
        ) from None
