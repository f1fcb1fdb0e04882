"""Socket options: numbers that Python's socket module lacks, and the one table of options that travel.

Numbers are from include/uapi/asm-generic/socket.h and linux/{in,in6,tcp,udp,netlink,sockios}.h up to 6.16. An option
that the running kernel or the kind of socket does not know is skipped when reading.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from lazyproc.kernel._core import ffi, lib
from lazyproc.kernel.sys import syscall

SYS_CONNECT, SYS_RECVMSG, SYS_SETSOCKOPT, SYS_GETSOCKOPT = 42, 47, 54, 55
SOL_SOCKET, SOL_IP, SOL_TCP, SOL_UDP, SOL_IPV6, SOL_NETLINK = socket.SOL_SOCKET, 0, 6, 17, 41, 270
IPPROTO_MPTCP = 262

SO_DEBUG, SO_REUSEADDR, SO_DONTROUTE, SO_BROADCAST, SO_SNDBUF, SO_RCVBUF, SO_KEEPALIVE = 1, 2, 5, 6, 7, 8, 9
SO_OOBINLINE, SO_NO_CHECK, SO_PRIORITY, SO_LINGER, SO_REUSEPORT, SO_PASSCRED = 10, 11, 12, 13, 15, 16
SO_RCVLOWAT, SO_RCVTIMEO, SO_SNDTIMEO, SO_ATTACH_FILTER, SO_TIMESTAMP = 18, 20, 21, 26, 29
SO_SNDBUFFORCE, SO_RCVBUFFORCE, SO_PASSSEC, SO_TIMESTAMPNS, SO_MARK, SO_TIMESTAMPING = 32, 33, 34, 35, 36, 37
SO_RXQ_OVFL, SO_PEEK_OFF, SO_LOCK_FILTER, SO_SELECT_ERR_QUEUE, SO_BUSY_POLL = 40, 42, 44, 45, 46
SO_MAX_PACING_RATE, SO_MEMINFO, SO_ZEROCOPY, SO_TXTIME, SO_NETNS_COOKIE, SO_BUF_LOCK = 47, 55, 60, 61, 71, 72
SO_TXREHASH, SO_RCVMARK, SO_PASSPIDFD, SO_PASSRIGHTS = 74, 75, 76, 83

IP_TOS, IP_TTL, IP_RECVOPTS, IP_RETOPTS, IP_PKTINFO, IP_MTU_DISCOVER, IP_RECVERR = 1, 2, 6, 7, 8, 10, 11
IP_RECVTTL, IP_RECVTOS, IP_FREEBIND, IP_TRANSPARENT, IP_RECVORIGDSTADDR, IP_MINTTL = 12, 13, 15, 19, 20, 21
IP_NODEFRAG, IP_CHECKSUM, IP_BIND_ADDRESS_NO_PORT, IP_RECVERR_RFC4884, IP_MULTICAST_IF = 22, 23, 24, 26, 32
IP_MULTICAST_TTL, IP_MULTICAST_LOOP, IP_MULTICAST_ALL, IP_UNICAST_IF, IP_LOCAL_PORT_RANGE = 33, 34, 49, 50, 51

IPV6_UNICAST_HOPS, IPV6_MULTICAST_IF, IPV6_MULTICAST_HOPS, IPV6_MULTICAST_LOOP = 16, 17, 18, 19
IPV6_MTU_DISCOVER, IPV6_RECVERR, IPV6_V6ONLY, IPV6_MULTICAST_ALL, IPV6_RECVERR_RFC4884 = 23, 25, 26, 29, 31
IPV6_FLOWINFO_SEND, IPV6_RECVPKTINFO, IPV6_RECVHOPLIMIT, IPV6_RECVHOPOPTS, IPV6_RECVRTHDR = 33, 49, 51, 53, 56
IPV6_RECVDSTOPTS, IPV6_RECVPATHMTU, IPV6_DONTFRAG, IPV6_RECVTCLASS, IPV6_TCLASS = 58, 60, 62, 66, 67
IPV6_AUTOFLOWLABEL, IPV6_ADDR_PREFERENCES, IPV6_MINHOPCOUNT, IPV6_RECVORIGDSTADDR = 70, 72, 73, 74
IPV6_TRANSPARENT, IPV6_UNICAST_IF, IPV6_RECVFRAGSIZE, IPV6_FREEBIND = 75, 76, 77, 78

TCP_NODELAY, TCP_MAXSEG, TCP_CORK, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_SYNCNT = 1, 2, 3, 4, 5, 6, 7
TCP_LINGER2, TCP_DEFER_ACCEPT, TCP_WINDOW_CLAMP, TCP_CONGESTION, TCP_THIN_LINEAR_TIMEOUTS = 8, 9, 10, 13, 16
TCP_USER_TIMEOUT, TCP_FASTOPEN, TCP_NOTSENT_LOWAT, TCP_SAVE_SYN, TCP_FASTOPEN_CONNECT, TCP_ULP = (
    18,
    23,
    25,
    27,
    30,
    31,
)
TCP_FASTOPEN_NO_COOKIE, TCP_INQ, TCP_TX_DELAY = 34, 36, 37
UDP_CORK, UDP_ENCAP, UDP_NO_CHECK6_TX, UDP_NO_CHECK6_RX, UDP_SEGMENT, UDP_GRO = 1, 100, 101, 102, 103, 104
NETLINK_ADD_MEMBERSHIP, NETLINK_PKTINFO, NETLINK_BROADCAST_ERROR, NETLINK_NO_ENOBUFS = 1, 3, 4, 5
NETLINK_LISTEN_ALL_NSID, NETLINK_LIST_MEMBERSHIPS, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 8, 9, 10, 11
NETLINK_GET_STRICT_CHK = 12

SIOCINQ, SIOCOUTQ, SIOCOUTQNSD, SIOCUNIXFILE, SIOCGSKNS = 0x541B, 0x5411, 0x894B, 0x89E0, 0x894C
TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE = 1, 4, 5, 7
TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_LISTEN, TCP_CLOSING = 8, 9, 10, 11
RCV_SHUTDOWN, SEND_SHUTDOWN = 1, 2

# They decide what bind(2) and connect(2) may do, so they are set before those.
_EARLY = (
    *((SOL_SOCKET, name) for name in (SO_REUSEADDR, SO_REUSEPORT, SO_MARK)),
    *((SOL_IP, name) for name in (IP_FREEBIND, IP_TRANSPARENT, IP_BIND_ADDRESS_NO_PORT, IP_LOCAL_PORT_RANGE)),
    *((SOL_IPV6, name) for name in (IPV6_V6ONLY, IPV6_FREEBIND, IPV6_TRANSPARENT)),
)

# All others wait until queues are full again: SO_PASSCRED would stamp refilled packets with our own
# credentials, SO_PEEK_OFF would be moved, a filter would drop. Order matters: IP_TOS changes SO_PRIORITY, a
# buffer size sets its lock, SO_LOCK_FILTER closes the door.
_SOCKET = (
    *(SO_DEBUG, SO_DONTROUTE, SO_BROADCAST, SO_SNDBUF, SO_RCVBUF, SO_BUF_LOCK, SO_KEEPALIVE, SO_OOBINLINE),
    *(SO_NO_CHECK, SO_LINGER, SO_PASSCRED, SO_PASSPIDFD, SO_PASSSEC, SO_PASSRIGHTS, SO_RCVLOWAT, SO_RCVTIMEO),
    *(
        SO_SNDTIMEO,
        SO_TIMESTAMP,
        SO_TIMESTAMPNS,
        SO_TIMESTAMPING,
        SO_RXQ_OVFL,
        SO_PEEK_OFF,
        SO_SELECT_ERR_QUEUE,
    ),
    *(SO_BUSY_POLL, SO_MAX_PACING_RATE, SO_ZEROCOPY, SO_TXTIME, SO_TXREHASH, SO_RCVMARK),
)
_IP = (
    *(
        IP_TOS,
        IP_TTL,
        IP_RECVOPTS,
        IP_RETOPTS,
        IP_PKTINFO,
        IP_MTU_DISCOVER,
        IP_RECVERR,
        IP_RECVTTL,
        IP_RECVTOS,
    ),
    *(IP_RECVORIGDSTADDR, IP_MINTTL, IP_NODEFRAG, IP_CHECKSUM, IP_RECVERR_RFC4884, IP_MULTICAST_IF),
    *(IP_MULTICAST_TTL, IP_MULTICAST_LOOP, IP_MULTICAST_ALL, IP_UNICAST_IF),
)
_IPV6 = (
    *(IPV6_UNICAST_HOPS, IPV6_MULTICAST_IF, IPV6_MULTICAST_HOPS, IPV6_MULTICAST_LOOP, IPV6_MTU_DISCOVER),
    *(IPV6_RECVERR, IPV6_MULTICAST_ALL, IPV6_RECVERR_RFC4884, IPV6_FLOWINFO_SEND, IPV6_RECVPKTINFO),
    *(IPV6_RECVHOPLIMIT, IPV6_RECVHOPOPTS, IPV6_RECVRTHDR, IPV6_RECVDSTOPTS, IPV6_RECVPATHMTU, IPV6_DONTFRAG),
    *(IPV6_RECVTCLASS, IPV6_TCLASS, IPV6_AUTOFLOWLABEL, IPV6_ADDR_PREFERENCES, IPV6_MINHOPCOUNT),
    *(IPV6_RECVORIGDSTADDR, IPV6_UNICAST_IF, IPV6_RECVFRAGSIZE),
)
_TCP = (
    *(
        TCP_NODELAY,
        TCP_CORK,
        TCP_KEEPIDLE,
        TCP_KEEPINTVL,
        TCP_KEEPCNT,
        TCP_SYNCNT,
        TCP_LINGER2,
        TCP_DEFER_ACCEPT,
    ),
    *(TCP_CONGESTION, TCP_THIN_LINEAR_TIMEOUTS, TCP_USER_TIMEOUT, TCP_NOTSENT_LOWAT, TCP_SAVE_SYN),
    *(TCP_FASTOPEN_CONNECT, TCP_FASTOPEN_NO_COOKIE, TCP_INQ, TCP_TX_DELAY),
)
# On a connection these show what the kernel made of it, not what was set.
_TCP_IDLE = (TCP_MAXSEG, TCP_WINDOW_CLAMP, TCP_FASTOPEN)
_UDP = (UDP_CORK, UDP_ENCAP, UDP_NO_CHECK6_TX, UDP_NO_CHECK6_RX, UDP_SEGMENT, UDP_GRO)
_NETLINK = (
    *(NETLINK_PKTINFO, NETLINK_BROADCAST_ERROR, NETLINK_NO_ENOBUFS),
    *(NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK),
)
_LAST = ((SOL_SOCKET, SO_PRIORITY), (SOL_SOCKET, SO_ATTACH_FILTER), (SOL_SOCKET, SO_LOCK_FILTER))

LATE = (
    *((SOL_SOCKET, name) for name in _SOCKET),
    *((SOL_IP, name) for name in _IP),
    *((SOL_IPV6, name) for name in _IPV6),
    *((SOL_TCP, name) for name in (*_TCP, *_TCP_IDLE)),
    *((SOL_UDP, name) for name in _UDP),
    *((SOL_NETLINK, name) for name in _NETLINK),
    *_LAST,
)
EARLY = _EARLY
FREEBIND = ((SOL_IP, IP_FREEBIND), (SOL_IPV6, IPV6_FREEBIND))  # one bit of the socket with two names

# TCP has no multicast; an accepted socket shows the interface and the TTL that its SYN came with.
_MULTICAST = {
    *((SOL_IP, name) for name in (IP_MULTICAST_IF, IP_MULTICAST_TTL, IP_MULTICAST_LOOP, IP_MULTICAST_ALL)),
    *((SOL_IPV6, name) for name in (IPV6_MULTICAST_IF, IPV6_MULTICAST_HOPS, IPV6_MULTICAST_LOOP)),
    (SOL_IPV6, IPV6_MULTICAST_ALL),
}
_FORCED = {SO_SNDBUF: SO_SNDBUFFORCE, SO_RCVBUF: SO_RCVBUFFORCE}
_UNKNOWN = {errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTCONN}
_BPF_MAXINSNS, _INSTRUCTION = 4096, 8  # linux/bpf_common.h, sizeof(struct sock_filter)


_Options: TypeAlias = tuple[tuple[int, int], ...]  # level, name


class Unset(NamedTuple):
    """An option that this host did not take."""

    level: int
    name: int
    error: OSError


def read_options(sock: socket.socket, *, connected: bool) -> dict[tuple[int, int], bytes]:
    """Every option of the table that this socket knows, as getsockopt(2) gives it.

    The filter (SO_ATTACH_FILTER) is left to `classic_filter`, since it can be unreadable.
    """
    options, numbers = _readable(sock.family, sock.type, sock.proto, connected)
    room = ffi.new("uint8_t[]", lib.LP_OPTION * len(options))
    lengths = ffi.new("int32_t[]", len(options))
    lib.lp_getsockopts(sock.fileno(), numbers, len(options), room, lengths)
    read = ffi.buffer(room)
    values = {}
    for at, option, length in zip(range(0, len(read), lib.LP_OPTION), options, lengths, strict=True):
        if length >= 0:
            values[option] = read[at : at + length]
        elif -length not in _UNKNOWN:
            raise OSError(-length, os.strerror(-length))
    return values


@functools.cache
def _readable(family: int, kind: int, protocol: int, connected: bool) -> tuple[_Options, object]:
    """The options that may be read of such a socket, and the same as C takes them."""
    levels = {SOL_SOCKET}
    if family in (socket.AF_INET, socket.AF_INET6):
        levels |= {SOL_IP, protocol}
    if family == socket.AF_INET6:
        levels.add(SOL_IPV6)
    if family == socket.AF_NETLINK:
        levels.add(SOL_NETLINK)
    skipped = {(SOL_SOCKET, SO_ATTACH_FILTER)}
    if kind == socket.SOCK_STREAM:
        skipped |= _MULTICAST
    if connected:
        skipped |= {(SOL_TCP, name) for name in _TCP_IDLE}
    options = tuple(option for option in (*EARLY, *LATE) if option[0] in levels and option not in skipped)
    return options, ffi.new("int32_t[][2]", options)


def set_options(
    sock: socket.socket, values: Mapping[tuple[int, int], bytes], which: tuple[tuple[int, int], ...]
) -> list[Unset]:
    """Set those of `values` that are in `which`, in its order, where the socket shows another value now."""
    unset = []
    for level, name in which:
        value = values.get((level, name))
        try:
            if value is not None and (level, name) == (SOL_SOCKET, SO_ATTACH_FILTER):
                _attach_filter(sock, value)
            elif value is not None and sock.getsockopt(level, name, 256) != value:
                set_raw(sock, level, name, value)
        except OSError as error:
            unset.append(Unset(level, name, error))
    return unset


def set_raw(sock: socket.socket, level: int, name: int, value: bytes) -> None:
    """setsockopt(2) with what getsockopt(2) gave; the kernel doubles buffer sizes (socket(7)), so they are
    halved.
    """
    if level == SOL_SOCKET and name in _FORCED:
        sock.setsockopt(level, _FORCED[name], int.from_bytes(value, "little") // 2)
    else:
        sock.setsockopt(level, name, value)


def classic_filter(sock: socket.socket) -> bytes:
    """The socket's BPF filter as struct sock_filter[], b"" without one.

    EACCES for an eBPF program, which cannot be read back. SO_GET_FILTER counts its length in instructions,
    not in bytes (net/core/filter.c, sk_get_filter), so Python's getsockopt would overrun its buffer.
    """
    program = ffi.new("uint8_t[]", _BPF_MAXINSNS * _INSTRUCTION)
    count = ffi.new("uint32_t *", _BPF_MAXINSNS)
    syscall(SYS_GETSOCKOPT, sock.fileno(), SOL_SOCKET, SO_ATTACH_FILTER, _address(program), _address(count))
    return bytes(ffi.buffer(program, count[0] * _INSTRUCTION))


def _attach_filter(sock: socket.socket, program: bytes) -> None:
    """SO_ATTACH_FILTER takes struct sock_fprog: the count, padding to 8 bytes, the program's address."""
    instructions = ffi.from_buffer(program)
    fprog = ffi.new("uint64_t[2]", [len(program) // _INSTRUCTION, _address(instructions)])
    syscall(SYS_SETSOCKOPT, sock.fileno(), SOL_SOCKET, SO_ATTACH_FILTER, _address(fprog), 16)


def peek_all_but_last(sock: socket.socket, length: int) -> int:
    """How many of the next `length` bytes of a unix stream belong to other messages than the last of
    them.

    A peek of any size gives the descriptors of the next message that has some, however far away, so
    sizes tell nothing. But a message is copied whole or not at all: with one unwritable byte at the end
    of the buffer the last one fails and the count is that of those before it (net/unix/af_unix.c,
    unix_stream_read_generic).
    """
    buffer = ffi.new("uint8_t[]", length)
    unwritable = 16  # below vm.mmap_min_addr
    iovec = ffi.new("uint64_t[4]", [_address(buffer), length - 1, unwritable, 1])
    header = ffi.new("uint64_t[7]", [0, 0, _address(iovec), 2, 0, 0, 0])  # struct msghdr, no control buffer
    try:
        return syscall(SYS_RECVMSG, sock.fileno(), _address(header), socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return 0


def disconnect(sock: socket.socket) -> None:
    """connect(2) with AF_UNSPEC, which Python cannot say: a datagram socket has no peer any more."""
    unspecified = ffi.new("uint8_t[16]")
    syscall(SYS_CONNECT, sock.fileno(), _address(unspecified), 16)


def _address(pointer: object) -> int:
    return int(ffi.cast("uintptr_t", pointer))
