"""A unix(7) socket as data: its name, its file, its peer, what waits at it."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Mapping, Set

from lazyproc.dump.pending import waits
from lazyproc.dump.registry import Refused, Registry
from lazyproc.facts import dataclass
from lazyproc.kernel.netns import namespace_of
from lazyproc.kernel.sockdiag import UnixInfo
from lazyproc.kernel.sockopt import SIOCUNIXFILE, SOL_SOCKET, TCP_CLOSE, TCP_ESTABLISHED, TCP_LISTEN
from lazyproc.model import Packet, SocketOptions, UnixSocket
from lazyproc.outside import external_socket

_UCRED = struct.Struct("=iii")
_READ = "let the program read it first"
_MOMENT = "try again in a moment, or let the program accept it first"


@dataclass(frozen=True, slots=True)
class UnixNamespace:
    """sock_diag's view of all unix sockets of a network namespace, by inode; `listeners` are some of them."""

    sockets: Mapping[int, UnixInfo]
    listeners: tuple[UnixInfo, ...]


def view(sockets: Mapping[int, UnixInfo]) -> UnixNamespace:
    return UnixNamespace(sockets, tuple(info for info in sockets.values() if info.state == TCP_LISTEN))


def gather_unix(
    registry: Registry,
    sock: socket.socket,
    known: UnixNamespace,
    tree: Set[int],
    options: SocketOptions,
    queue: tuple[Packet, ...],
) -> UnixSocket:
    """`tree`: the inodes of the tree's sockets. Raises Refused."""
    inode = os.fstat(sock.fileno()).st_ino
    info = known.sockets[inode]
    outside = known.sockets.get(info.peer) if info.peer not in tree else None
    peer_name = _name_to_connect_to(registry, sock, outside) if outside else b""
    may_lead_out = bool(peer_name) or external_socket(inode) in registry.permits.external
    state, peer = _connection(sock, info, known, tree, may_lead_out=may_lead_out)
    bound_here = bool(info.name) and _bound_here(sock, info, known)
    path, mode, uid, gid = _socket_file(registry, sock) if bound_here and info.file else ("", 0, 0, 0)
    return UnixSocket(
        inode=inode,
        type=sock.type,
        state=state,
        peer=peer,
        name=info.name,
        bound_here=bound_here,
        backlog=info.wqueue if state == TCP_LISTEN else 0,
        shutdown=info.shutdown,
        options=options,
        queue=queue,
        mode=mode,
        uid=uid,
        gid=gid,
        pending=_pending(info, tree) if state == TCP_LISTEN else (),
        path=path,
        peer_credentials=None if state == TCP_CLOSE else _peer_credentials(registry, sock),
        peer_name=peer_name,
        reset=state == TCP_ESTABLISHED and not peer and waits(sock),
    )


def _name_to_connect_to(registry: Registry, sock: socket.socket, peer: UnixInfo) -> bytes:
    """Where that is permitted, of datagram sockets, whose peers are told nothing of a new one; b"" for a name that does
    not lead to the peer from the tree.
    """
    if not registry.permits.datagrams_out or sock.type != socket.SOCK_DGRAM:
        return b""
    if peer.name.startswith(b"\0"):
        return peer.name
    there = _stat(registry.outside(os.fsdecode(peer.name))) if peer.name.startswith(b"/") else None
    return peer.name if there and peer.file and there.st_ino & 0xFFFFFFFF == peer.file[0] else b""


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _connection(
    sock: socket.socket, info: UnixInfo, known: UnixNamespace, tree: Set[int], *, may_lead_out: bool
) -> tuple[int, int]:
    """The state (a connected datagram socket is ESTABLISHED, whatever the kernel says) and the peer, which is in the
    tree unless it `may_lead_out`.

    ESTABLISHED with peer 0: the peer was closed, or the connection waits in the `pending` of a listening
    socket.
    """
    if info.state == TCP_LISTEN:
        return TCP_LISTEN, 0
    if info.peer:
        if info.peer not in tree and may_lead_out:
            # A stream whose other end is shut down can be read as well: that is its end.
            if info.rqueue or (sock.type != socket.SOCK_STREAM and holds_data(sock)):
                raise Refused("holds data from outside of the process tree that it has not read", _READ)
        elif info.peer not in tree:
            raise Refused(
                f"is connected to {_described(known.sockets.get(info.peer))} outside of the process tree",
                "move both ends in one tree, or close it before the move and connect again after it",
            )
        return TCP_ESTABLISHED, info.peer
    if not has_peer(sock):
        return TCP_CLOSE, 0
    listener = next((other for other in known.listeners if info.inode in other.pending), None)
    if listener is not None and listener.inode not in tree:
        raise Refused(f"waits to be accepted by {_described(listener)} outside of the process tree", _MOMENT)
    if listener is not None and info.wqueue:
        raise Refused(
            f"has sent data that waits until {_described(listener)} accepts the connection", _MOMENT
        )
    return TCP_ESTABLISHED, 0


def _described(info: UnixInfo | None) -> str:
    if info is None or not info.name:
        return "an unnamed socket"
    text = os.fsdecode(info.name)
    return f"socket @{text[1:]}" if text.startswith("\0") else f"socket {text}"


def holds_data(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return any(events & select.POLLIN for _fd, events in poll.poll(0))


def has_peer(sock: socket.socket) -> bool:
    """Whether the socket is connected, if only to one that is closed or not accepted yet."""
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return False
        raise
    return True


def _pending(info: UnixInfo, tree: Set[int]) -> tuple[int, ...]:
    if 0 in info.pending:
        raise Refused("holds a connection that was closed before it was accepted", _MOMENT)
    if not tree >= set(info.pending):
        raise Refused("holds a connection from outside of the process tree, not accepted yet", _MOMENT)
    return info.pending


def _bound_here(sock: socket.socket, info: UnixInfo, known: UnixNamespace) -> bool:
    """Whether the socket has its name from bind(2), not from the listening socket that accepted it."""
    if sock.type == socket.SOCK_DGRAM or info.state == TCP_LISTEN or (not info.peer and not has_peer(sock)):
        return True
    if any((other.name, other.file) == (info.name, info.file) for other in known.listeners):
        return False
    return _file_has_owner(sock) if info.file else _name_is_taken(sock, info.name)


def _file_has_owner(sock: socket.socket) -> bool:
    """Connecting with the wrong type fails with EPROTOTYPE when a socket is bound to the file, else
    ECONNREFUSED.
    """
    file = fcntl.ioctl(sock, SIOCUNIXFILE)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            return probe.connect_ex(f"/proc/self/fd/{file}") != errno.ECONNREFUSED
    finally:
        os.close(file)


def _name_is_taken(sock: socket.socket, name: bytes) -> bool:
    """An abstract name is free for a moment's bind(2) when its listening socket is gone."""
    with namespace_of(sock), socket.socket(socket.AF_UNIX, sock.type) as probe:
        try:
            probe.bind(name)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise
    return False


def _socket_file(registry: Registry, sock: socket.socket) -> tuple[str, int, int, int]:
    """Where the socket's file lies, from the tree's root, with mode and owner; ("", 0, 0, 0) when
    unlinked.
    """
    file = fcntl.ioctl(sock, SIOCUNIXFILE)
    try:
        own = os.fstat(file)
        path = registry.inside(os.readlink(f"/proc/self/fd/{file}"))
    finally:
        os.close(file)
    try:
        there = os.lstat(registry.outside(path))
    except OSError:
        return "", 0, 0, 0
    if (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino):
        return "", 0, 0, 0
    return path, own.st_mode, own.st_uid, own.st_gid


def _peer_credentials(registry: Registry, sock: socket.socket) -> tuple[int, int, int] | None:
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid == 0xFFFFFFFF or uid == -1:  # a datagram socket that was connected by connect(2) has none
        return None
    return (registry.vpid(pid) or registry.number_of_dead(pid)) if pid else 0, uid, gid
