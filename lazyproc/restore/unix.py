"""Making unix(7) sockets again: named, paired, connected, waiting to be accepted, and with their queues
full.

The order is the point: listening sockets first, so that connections can go through them and show their
names; then connections; then those that wait to be accepted. Datagram sockets are connected one way only
when their queues are full, since a connected one takes packets from its peer alone.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from lazyproc.errors import RestoreError
from lazyproc.facts import dataclass, field
from lazyproc.kernel.sockopt import EARLY, SO_SNDBUFFORCE, SOL_SOCKET, TCP_ESTABLISHED, TCP_LISTEN, disconnect
from lazyproc.model import Packet, UnixSocket
from lazyproc.needs import NameNeed
from lazyproc.restore.names import address_of, bind, bind_with_file
from lazyproc.restore.options import apply
from lazyproc.restore.peercred import Callers, Credentials
from lazyproc.restore.workshop import OpenPath, words

_AMPLE = 1 << 29  # bytes: SO_SNDBUFFORCE doubles it
_MANY = 4096  # connections
_SCM_RIGHTS, _SCM_CREDENTIALS = 1, 2


@dataclass(slots=True)
class UnixSockets:
    """The unix sockets of one checkpoint under construction. `made` has them by inode; `stack` closes
    them.
    """

    sockets: Mapping[int, UnixSocket]  # by inode
    open_path: OpenPath
    callers: Callers
    stack: ExitStack
    made: dict[int, socket.socket] = field(default_factory=dict)
    _feeders: dict[int, socket.socket] = field(
        default_factory=dict
    )  # other ends that are closed already at the source
    _listeners: dict[tuple[bytes, int], int] = field(init=False)  # inodes by name and type

    def __post_init__(self) -> None:
        listeners = [unix for unix in self.sockets.values() if unix.state == TCP_LISTEN]
        self._listeners = {(unix.name, unix.type): unix.inode for unix in reversed(listeners)}

    def make(self) -> None:
        """All sockets, bound and connected, with empty queues."""
        waiting = {inode for unix in self.sockets.values() for inode in unix.pending}
        for unix in self.sockets.values():
            if unix.state != TCP_ESTABLISHED:
                with _words(unix):
                    self._make_single(unix)
        pairs: dict[int, UnixSocket] = {}  # by the inode of one end
        for unix in self.sockets.values():
            if unix.state != TCP_ESTABLISHED or unix.inode in waiting or unix.inode in self.made:
                continue
            if not self._is_pair(unix):
                with _words(unix):
                    self._make_connected(unix)
            elif unix.peer not in pairs:
                pairs[unix.inode] = unix
        self._make_pairs(pairs.values())
        for unix in self.sockets.values():
            if unix.state == TCP_LISTEN:
                with _words(unix):
                    self._queue_connections(unix)

    def fill(self, files: Mapping[int, int], pids: Mapping[int, int]) -> None:
        """Put the queued packets back, with their descriptors (`files`, by file id) and their senders'
        credentials (`pids`: vpid to a pid of ours; a sender that is no more gets our own).
        """
        for unix in self.sockets.values():
            for packet in unix.queue:
                self._send(unix, packet, files, pids)
        for inode, feeder in self._feeders.items():
            if self.sockets[inode].reset:  # what it has not read when it is closed makes it one
                self.made[inode].send(b"\0", socket.MSG_DONTWAIT)
            feeder.close()
        for unix in self.sockets.values():
            if unix.peer_name:
                self._connect_out(unix)
            elif unix.peer and unix.type == socket.SOCK_DGRAM and not self._is_mutual(unix):
                self._connect_one_way(unix)

    # --- making
    # ---------------------------------------------------------------------------------------------

    def _make_single(self, unix: UnixSocket) -> None:
        sock = self._new(unix)
        if unix.name:
            self._bind(sock, unix)
        if unix.state == TCP_LISTEN:
            self.callers.listen(sock, _MANY, unix.peer_credentials)

    def _new(self, unix: UnixSocket) -> socket.socket:
        return self._keep(unix, socket.socket(socket.AF_UNIX, unix.type))

    def _keep(self, unix: UnixSocket, sock: socket.socket) -> socket.socket:
        self.made[unix.inode] = self.stack.enter_context(sock)
        apply(sock, unix.options, EARLY)
        return sock

    def _bind(self, sock: socket.socket, unix: UnixSocket) -> None:
        if unix.path:
            bind_with_file(sock, unix, self.open_path)
        else:
            bind(sock, unix.name)

    def _is_pair(self, unix: UnixSocket) -> bool:
        """Whether it is as socketpair(2) makes it, and its peer, where that is not gone already."""
        peer = self.sockets.get(unix.peer)
        accepted = any(each is not None and each.name and not each.bound_here for each in (unix, peer))
        return not (unix.peer_name or accepted or self._is_one_way(unix))

    def _make_connected(self, unix: UnixSocket) -> None:
        """A socket that is no pair with its peer, and that peer."""
        peer = self.sockets.get(unix.peer)
        if unix.peer_name:
            self._make_single(unix)
        elif peer is not None and self._is_one_way(unix):
            self._make_one_way(unix, peer)
        elif unix.name and not unix.bound_here:
            self._make_accepted(unix, peer)
        elif peer is not None:
            self._make_accepted(peer, unix)

    def _is_one_way(self, unix: UnixSocket) -> bool:
        return unix.type == socket.SOCK_DGRAM and unix.peer in self.sockets and not self._is_mutual(unix)

    def _is_mutual(self, unix: UnixSocket) -> bool:
        """Each is connected to the other; not a datagram socket that is connected to itself."""
        peer = self.sockets.get(unix.peer)
        return peer is not None and peer is not unix and peer.peer == unix.inode

    def _make_pairs(self, pairs: Iterable[UnixSocket]) -> None:
        """By one end of each. Where the other is gone already, a feeder is in its place."""
        alike: dict[tuple[int, Credentials | None], list[UnixSocket]] = {}
        for unix in pairs:
            alike.setdefault((unix.type, unix.peer_credentials), []).append(unix)
        for (kind, who), group in alike.items():
            with _words(group[0]):
                made = self.callers.socketpairs(kind, who, len(group))
            for unix, ends in zip(group, made, strict=True):
                with _words(unix):
                    self._keep_pair(unix, self.sockets.get(unix.peer), *ends)

    def _keep_pair(
        self, unix: UnixSocket, peer: UnixSocket | None, here: socket.socket, there: socket.socket
    ) -> None:
        self._keep(unix, here)
        if unix.name:
            self._bind(here, unix)
        self._keep_other(unix, peer, there)
        if peer is not None and peer.name:
            self._bind(there, peer)

    def _keep_other(self, unix: UnixSocket, peer: UnixSocket | None, there: socket.socket) -> None:
        if peer is None:
            self._feeders[unix.inode] = self.stack.enter_context(there)
        else:
            self._keep(peer, there)

    def _make_accepted(self, unix: UnixSocket, peer: UnixSocket | None) -> None:
        """`unix` has its name from the listening socket that accepted it: that one, or one made for the
        moment.
        """
        with ExitStack() as moment:
            listener = self._listener(unix.name, unix.type)
            if listener is None:
                listener = moment.enter_context(socket.socket(socket.AF_UNIX, unix.type))
                bind(listener, unix.name)
                self.callers.listen(listener, _MANY, peer.peer_credentials if peer else None)
            there = socket.socket(socket.AF_UNIX, unix.type)
            self._keep_other(unix, peer, there)
            if peer is not None and peer.name:
                self._bind(there, peer)
            self.callers.connect(there, listener, unix.name, unix.peer_credentials)
            self._keep(unix, listener.accept()[0])

    def _listener(self, name: bytes, kind: int) -> socket.socket | None:
        inode = self._listeners.get((name, kind))
        return None if inode is None else self.made[inode]

    def _queue_connections(self, unix: UnixSocket) -> None:
        """Connections that nobody has accepted yet, oldest first; then the real backlog."""
        for inode in unix.pending:
            client = self.sockets[inode]
            sock = self._new(client)
            if client.name:
                self._bind(sock, client)
            self.callers.connect(sock, self.made[unix.inode], unix.name, None)
        self.callers.listen(self.made[unix.inode], unix.backlog, unix.peer_credentials)

    def _make_one_way(self, unix: UnixSocket, peer: UnixSocket) -> None:
        """A datagram socket connected to one that is not connected back. One without a name can only be the
        other half of a pair that was disconnected.
        """
        if peer.name:
            sock = self._new(unix)
            if unix.name:
                self._bind(sock, unix)
            return
        if peer.inode in self.made:
            self.made.pop(peer.inode).close()
        self._make_pairs([unix])
        disconnect(self.made[peer.inode])

    def _connect_one_way(self, unix: UnixSocket) -> None:
        peer = self.sockets[unix.peer]
        if peer.name:
            self.callers.connect(self.made[unix.inode], self.made[unix.peer], peer.name, None)

    def _connect_out(self, unix: UnixSocket) -> None:
        """To whoever has the name here. Raises RestoreError."""
        sock, name = self.made[unix.inode], unix.peer_name
        where = f"unix socket {os.fsdecode(name).replace(chr(0), '@', 1)}"
        with words(where, "nobody outside of the tree answers there", "start who did, before the restore"):
            if name.startswith(b"\0"):
                sock.connect(name)
                return
            file = self.open_path(os.fsdecode(name), os.O_PATH | os.O_CLOEXEC, 0)
            try:
                sock.connect(f"/proc/self/fd/{file}")
            finally:
                os.close(file)

    # --- queues
    # ---------------------------------------------------------------------------------------------

    def _send(
        self, unix: UnixSocket, packet: Packet, files: Mapping[int, int], pids: Mapping[int, int]
    ) -> None:
        with ExitStack() as moment:
            sender = self._sender(unix, packet, moment)
            size = sender.getsockopt(SOL_SOCKET, socket.SO_SNDBUF) // 2
            sender.setsockopt(SOL_SOCKET, SO_SNDBUFFORCE, _AMPLE)
            address: str | bytes | None = None
            if self._other_end(unix) is None:
                address = moment.enter_context(address_of(self.made[unix.inode], unix.name))
            try:
                _send_all(sender, packet, _ancillary(packet, files, pids), address)
            except BlockingIOError:
                raise RestoreError(
                    "the queue of a unix socket does not take what lay in it",
                    where=_where(unix),
                    remedy="raise sysctl net.unix.max_dgram_qlen to the source's value",
                ) from None
            sender.setsockopt(SOL_SOCKET, SO_SNDBUFFORCE, size)

    def _other_end(self, unix: UnixSocket) -> socket.socket | None:
        """The socket that is connected to this one and so feeds it; None for a datagram socket open to
        all.
        """
        if unix.inode in self._feeders:
            return self._feeders[unix.inode]
        if self._is_mutual(unix):
            return self.made[unix.peer]
        half = next((o for o in self.sockets.values() if o.peer == unix.inode and not unix.name), None)
        return self.made[half.inode] if half else None

    def _sender(self, unix: UnixSocket, packet: Packet, moment: ExitStack) -> socket.socket:
        """The socket that the packet came from, or one made for the moment with the same name."""
        other = self._other_end(unix)
        if other is not None:
            return other
        name = packet.sender[2:]
        for known in self.sockets.values():
            if known.type == socket.SOCK_DGRAM and name and known.name == name:
                return self.made[known.inode]
        sock = moment.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        if name:
            bind(sock, name)
        return sock


def _ancillary(
    packet: Packet, files: Mapping[int, int], pids: Mapping[int, int]
) -> list[tuple[int, int, bytes | array.array[int]]]:
    rows: list[tuple[int, int, bytes | array.array[int]]] = []
    if packet.file_ids:
        rows.append(
            (SOL_SOCKET, _SCM_RIGHTS, array.array("i", [files[number] for number in packet.file_ids]))
        )
    if packet.credentials is not None:
        vpid, uid, gid = packet.credentials
        ucred = struct.pack("=iii", pids.get(vpid, os.getpid()), uid, gid)
        rows.append((SOL_SOCKET, _SCM_CREDENTIALS, ucred))
    return rows


def _send_all(
    sender: socket.socket,
    packet: Packet,
    ancillary: list[tuple[int, int, bytes | array.array[int]]],
    address: str | bytes | None,
) -> None:
    """A datagram goes whole or not at all; a stream may take a part, whose rest follows without the
    descriptors.
    """
    sent = sender.sendmsg([packet.data], ancillary, socket.MSG_DONTWAIT, *([address] if address else []))
    credentials = [row for row in ancillary if row[1] == _SCM_CREDENTIALS]
    while sent < len(packet.data):
        sent += sender.sendmsg([packet.data[sent:]], credentials, socket.MSG_DONTWAIT)


def check_name(need: NameNeed) -> None:
    """Raise RestoreError unless the abstract name is free; a socket has it for a moment."""
    with _words(need), socket.socket(socket.AF_UNIX, need.type) as sock:
        bind(sock, need.name)


def _where(unix: UnixSocket | NameNeed) -> str:
    name = os.fsdecode(unix.name)
    if isinstance(unix, NameNeed) or name:
        return f"unix socket {name.replace(chr(0), '@', 1)}"
    return f"unnamed unix socket {unix.inode}"


@contextmanager
def _words(unix: UnixSocket | NameNeed) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        remedy = "stop the program that has the name: ss -lxp" if taken else "see `lazyproc check`"
        what = f"cannot be made again ({error.strerror})"
        raise RestoreError(what, where=_where(unix), remedy=remedy) from error
