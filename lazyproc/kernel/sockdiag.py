"""sock_diag(7): what the kernel knows of sockets, asked over netlink.

Every question opens its own netlink socket and so concerns the network namespace the *calling thread* is in.
Layouts: include/uapi/linux/{netlink,sock_diag,unix_diag,inet_diag}.h; meanings: net/unix/diag.c and
net/ipv4/inet_diag.c. Addresses are packed, network byte order (4 or 16 bytes); ports are ints.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

from lazyproc.errors import HostLacks, LazyprocError
from lazyproc.facts import dataclass

TCP_ESTABLISHED, TCP_CLOSE, TCP_LISTEN = 1, 7, 10  # include/net/tcp_states.h, unix sockets use them too

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NO_COOKIE = 2**64 - 1
_ALL = 0xFFFFFFFF

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, pid
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_UNIX_REQUEST = struct.Struct("=BBHIIIQ")  # family, protocol, pad, states, inode, show, cookie
_UNIX_MESSAGE = struct.Struct("=BBBBIQ")  # family, type, state, pad, inode, cookie
_INET_REQUEST = struct.Struct("=BBBBI 4s16s16sIQ")  # family, protocol, ext, pad, states, sockid
_INET_MESSAGE = struct.Struct("=BBBB HH16s16sIQ IIIII")  # family, state, timer, retrans, sockid, counters
_INET_PORTS = struct.Struct("!HH")

_SHOW_EVERYTHING = 0x7F  # UDIAG_SHOW_NAME, VFS, PEER, ICONS, RQLEN, MEMINFO, UID
_NAME, _VFS, _PEER, _ICONS, _RQLEN, _MEMINFO, _SHUTDOWN, _UID = range(8)  # UNIX_DIAG_*
_INET_DIAG_SHUTDOWN = 8


@dataclass(frozen=True, slots=True)
class UnixInfo:
    """A unix(7) socket. On a listening one `rqueue` counts waiting connections and `wqueue` is the backlog;
    on others they are the bytes it can read, and the memory in bytes of what its peer has not read yet.
    """

    inode: int
    type: int  # SOCK_*
    state: int  # TCP_*
    name: bytes  # without padding; abstract names begin with NUL; an accepted socket has its listener's
    file: tuple[int, int, int] | None  # (inode, major, minor) of the socket file, the inode cut to 32 bits
    peer: int  # inode; 0 none, or not accepted yet
    pending: tuple[int, ...]  # inodes of the *connecting* sockets not yet accepted; 0 has gone since
    rqueue: int
    wqueue: int
    meminfo: tuple[int, ...]  # SK_MEMINFO_*: RMEM_ALLOC, RCVBUF, WMEM_ALLOC, SNDBUF, ...
    shutdown: int  # 1 RCV_SHUTDOWN, 2 SEND_SHUTDOWN
    uid: int


@dataclass(frozen=True, slots=True)
class InetInfo:
    """A TCP or UDP socket. On a listening one `rqueue` counts waiting connections, `wqueue` is the backlog.

    `inode` is 0 when no descriptor refers to it (closed, TIME_WAIT, not accepted); `uid` then means nothing.
    """

    family: int
    protocol: int
    state: int  # TCP_*
    local: tuple[bytes, int]
    remote: tuple[bytes, int] | None
    inode: int
    uid: int
    rqueue: int
    wqueue: int
    interface: int  # index of SO_BINDTODEVICE, 0 none
    shutdown: int


def unix_sockets() -> dict[int, UnixInfo]:
    """All unix sockets of the current network namespace, by inode.

    Raises HostLacks when the kernel has no unix_diag.
    """
    request = _UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0, _ALL, 0, _SHOW_EVERYTHING, 0)
    infos = map(_unix_info, _ask(request, _NLM_F_DUMP))
    return {info.inode: info for info in infos}


def inet_sockets(family: int, protocol: int) -> tuple[InetInfo, ...]:
    """The sockets of one family (AF_INET, AF_INET6) and protocol (IPPROTO_TCP, IPPROTO_UDP).

    Only those in the kernel's hash tables: not one that was neither bound nor connected. Raises HostLacks
    when the kernel has no tcp_diag or udp_diag.
    """
    request = _INET_REQUEST.pack(family, protocol, 0, 0, _ALL, bytes(4), bytes(16), bytes(16), 0, 0)
    return tuple(_inet_info(message, protocol) for message in _ask(request, _NLM_F_DUMP))


def peer_uid_of_tcp(local: tuple[str, int], remote: tuple[str, int]) -> int | None:
    """The uid behind the other end of a TCP connection within this network namespace, or None: let nobody in.

    `local` and `remote` as getsockname() and getpeername() give them for *our* end. None when the other end
    is in another namespace or host, or is not an established socket held by somebody: a socket in TIME_WAIT
    shows uid 0, and one in SYN_SENT may be another's that took over the port.
    """
    (host, port), (peer_host, peer_port) = local[:2], remote[:2]
    ours, theirs = _packed(host), _packed(peer_host)
    family = socket.AF_INET if len(theirs) == 4 else socket.AF_INET6
    request = _INET_REQUEST.pack(
        family,
        socket.IPPROTO_TCP,
        0,
        0,
        _ALL,
        _INET_PORTS.pack(peer_port, port),
        theirs,
        ours,
        0,
        _NO_COOKIE,
    )
    for message in _ask(request, 0):
        info = _inet_info(message, socket.IPPROTO_TCP)
        # The lookup falls back to a listener on that port when there is no such connection.
        if info.state == TCP_ESTABLISHED and info.inode:
            return info.uid
    return None


def _packed(host: str) -> bytes:
    """An IPv4 address as an IPv6 socket shows it (::ffff:a.b.c.d) becomes IPv4, as the kernel hashes it."""
    if ":" not in host:
        return socket.inet_pton(socket.AF_INET, host)
    packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return packed[12:] if packed[:12] == bytes(10) + b"\xff\xff" else packed


# --- netlink ------------------------------------------------------------------------------------------------


def _ask(request: bytes, flags: int) -> Iterator[bytes]:
    """Send one request and yield the payload of every answer: none at all when there is no such socket."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as link:
        length = _HEADER.size + len(request)
        link.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | flags, 1, 0) + request)
        more = True
        while more:
            # The kernel builds answers of at most 32 KiB (net/netlink/af_netlink.c).
            for kind, payload in _messages(link.recv(1 << 16)):
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    _check(payload, dump=bool(flags))
                    return
                yield payload
            more = bool(flags)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        length, kind, _flags, _sequence, _pid = _HEADER.unpack_from(data, at)
        yield kind, data[at + _HEADER.size : at + length]
        at += _aligned(length)


def _check(payload: bytes, *, dump: bool) -> None:
    """Raise what NLMSG_ERROR or NLMSG_DONE carries: a negative errno, or 0."""
    (result,) = struct.unpack_from("=i", payload)
    if result == 0 or (not dump and result == -errno.ENOENT):
        return
    if result in (-errno.ENOENT, -errno.EOPNOTSUPP):
        raise HostLacks(
            "the kernel cannot list these sockets",
            where="sock_diag",
            remedy="load its modules: modprobe -a unix_diag tcp_diag udp_diag",
        )
    raise LazyprocError(os.strerror(-result), where="sock_diag")


def _attributes(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at < len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        found[kind] = data[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3


# --- messages -----------------------------------------------------------------------------------------------


def _unix_info(message: bytes) -> UnixInfo:
    _family, kind, state, _pad, inode, _cookie = _UNIX_MESSAGE.unpack_from(message)
    attributes = _attributes(message[_UNIX_MESSAGE.size :])
    rqueue, wqueue = _words(attributes[_RQLEN])
    file = None
    if _VFS in attributes:
        file_inode, device = _words(attributes[_VFS])
        file = (file_inode, device >> 20, device & 0xFFFFF)
    return UnixInfo(
        inode=inode,
        type=kind,
        state=state,
        name=_without_padding(attributes.get(_NAME, b"")),
        file=file,
        peer=sum(_words(attributes.get(_PEER, b""))),
        pending=_words(attributes.get(_ICONS, b"")),
        rqueue=rqueue,
        wqueue=wqueue,
        meminfo=_words(attributes[_MEMINFO]),
        shutdown=attributes[_SHUTDOWN][0],
        uid=_words(attributes[_UID])[0],
    )


def _without_padding(name: bytes) -> bytes:
    """A path ends in NUL; an abstract name begins with one and may hold others."""
    return name if name.startswith(b"\0") else name.rstrip(b"\0")


def _inet_info(message: bytes, protocol: int) -> InetInfo:
    fields = _INET_MESSAGE.unpack_from(message)
    family, state, _timer, _retrans, _, _, source, target, interface, _cookie = fields[:10]
    _expires, rqueue, wqueue, uid, inode = fields[10:]
    port, peer_port = _INET_PORTS.unpack_from(message, 4)
    size = 4 if family == socket.AF_INET else 16
    shutdown = _attributes(message[_INET_MESSAGE.size :]).get(_INET_DIAG_SHUTDOWN, b"\0")
    return InetInfo(
        family=family,
        protocol=protocol,
        state=state,
        local=(source[:size], port),
        remote=(target[:size], peer_port) if peer_port else None,
        inode=inode,
        uid=uid,
        rqueue=rqueue,
        wqueue=wqueue,
        interface=interface,
        shutdown=shutdown[0],
    )


def _words(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"={len(data) // 4}I", data)
