"""Multicast groups that a socket has joined (ip(7), IP_ADD_MEMBERSHIP; ipv6(7)).

No call lists them. But the groups of a network namespace are known (net/ipv4/igmp.c, net/ipv6/mcast.c), and the
filter of each, which says from whom it hears, can be asked of a socket, which has one as a member only.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lazyproc.kernel._core import ffi
from lazyproc.kernel.netns import namespace_of
from lazyproc.kernel.sockopt import SOL_IP, SOL_IPV6, SYS_GETSOCKOPT
from lazyproc.kernel.sys import syscall
from lazyproc.model import Membership

# linux/in.h
MCAST_JOIN_GROUP, MCAST_BLOCK_SOURCE, MCAST_JOIN_SOURCE_GROUP, MCAST_MSFILTER = 42, 43, 46, 48
MCAST_INCLUDE = 1
# All hosts, all routers, the solicited nodes of an address: interfaces have joined them themselves (RFC 1112, 4291).
_OF_INTERFACES = {bytes.fromhex("e0000001")} | {
    bytes.fromhex(f"ff0{scope}" + "00" * 13 + f"0{who}") for scope in (1, 2, 5) for who in (1, 2)
}
_SOLICITED = bytes.fromhex("ff0200000000000000000001ff")
_FILTER_SIZE = 144  # GROUP_FILTER_SIZE(0): interface, group as sockaddr_storage, mode, number of sources
_FILTER_TAIL = struct.Struct("=II")  # mode, number of sources
_ADDRESS_SIZE = 128  # struct sockaddr_storage


class Group(NamedTuple):
    """`address` is packed; `interface` is a name."""

    family: int
    address: bytes
    number: int  # of the interface
    interface: str


def groups(sock: socket.socket) -> tuple[Group, ...]:
    """Every group that a socket in the network namespace of this one may be a member of."""
    with namespace_of(sock):
        return (*_of_ipv4(_lines("igmp")), *_of_ipv6(_lines("igmp6")))


def _is_of_interface_alone(address: bytes, users: str) -> bool:
    return users == "1" and (address in _OF_INTERFACES or address.startswith(_SOLICITED))


def joined(sock: socket.socket, known: Sequence[Group]) -> Iterator[Membership]:
    """Those of the groups that the socket itself is a member of. An IPv6 socket may have joined IPv4 groups too."""
    for group in known:
        if (sock.family, group.family) == (socket.AF_INET, socket.AF_INET6):
            continue
        if (found := _membership(sock, group)) is not None:
            yield found


def join(sock: socket.socket, membership: Membership) -> None:
    """Raises OSError: ENODEV when there is no such interface."""
    level, family = _level(membership.family), membership.family
    interface = struct.pack("=I4x", _number(membership.interface))
    group = interface + _storage(family, membership.address)
    if not membership.only:
        sock.setsockopt(level, MCAST_JOIN_GROUP, group)
    how = MCAST_JOIN_SOURCE_GROUP if membership.only else MCAST_BLOCK_SOURCE
    for source in membership.sources:
        sock.setsockopt(level, how, group + _storage(family, source))


def _number(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError:  # without an errno, Python issue 43180
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from None


def _lines(name: str) -> list[str]:
    try:
        with open(f"/proc/thread-self/net/{name}") as file:
            return file.read().splitlines()
    except FileNotFoundError:  # a kernel without IPv6, or without CONFIG_IP_MULTICAST
        return []


def _of_ipv4(lines: Sequence[str]) -> Iterator[Group]:
    """An interface's line, "4\teth0      :     1      V3", and those of its groups, "\t\t\t\t010000E0     1 ..."."""
    index, interface = 0, ""
    for line in lines[1:]:
        words = line.split()
        if not line.startswith("\t"):
            index, interface = int(words[0]), words[1]
        elif not _is_of_interface_alone(address := struct.pack("=I", int(words[0], 16)), words[1]):
            yield Group(socket.AF_INET, address, index, interface)


def _of_ipv6(lines: Sequence[str]) -> Iterator[Group]:
    """ "4    eth0            ff020000000000000000000000000001     1 0000000C 0"."""
    for line in lines:
        index, interface, address, users, *_ = line.split()
        if not _is_of_interface_alone(bytes.fromhex(address), users):
            yield Group(socket.AF_INET6, bytes.fromhex(address), int(index), interface)


def _membership(sock: socket.socket, group: Group) -> Membership | None:
    """Asked twice: the first answer says how many sources there are. One that runs may have others by then."""
    if (filter_ := _filter(sock, group, 0)) is None:
        return None
    _mode, room = _FILTER_TAIL.unpack_from(filter_, _FILTER_SIZE - _FILTER_TAIL.size)
    if (filter_ := _filter(sock, group, room)) is None:
        return None
    mode, count = _FILTER_TAIL.unpack_from(filter_, _FILTER_SIZE - _FILTER_TAIL.size)
    start, length = (
        (4, 4) if group.family == socket.AF_INET else (8, 16)
    )  # in struct sockaddr_in, sockaddr_in6
    places = (_FILTER_SIZE + start + number * _ADDRESS_SIZE for number in range(min(count, room)))
    sources = tuple(filter_[at : at + length] for at in places)
    return Membership(group.family, group.address, group.interface, mode == MCAST_INCLUDE, sources)


def _filter(sock: socket.socket, group: Group, room: int) -> bytes | None:
    """struct group_filter with room for so many sources; None when it is no member."""
    size = _FILTER_SIZE + room * _ADDRESS_SIZE
    asked = struct.pack("=I4x", group.number) + _storage(group.family, group.address)
    asked = (asked + _FILTER_TAIL.pack(0, room)).ljust(size, b"\0")
    filter_, length = ffi.new("uint8_t[]", asked), ffi.new("uint32_t *", size)
    level = _level(group.family)
    try:
        syscall(SYS_GETSOCKOPT, sock.fileno(), level, MCAST_MSFILTER, _address(filter_), _address(length))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return None
    return bytes(ffi.buffer(filter_, size))


def _level(family: int) -> int:
    return SOL_IP if family == socket.AF_INET else SOL_IPV6


def _storage(family: int, address: bytes) -> bytes:
    """struct sockaddr_storage with the address."""
    layout = "=H2x4s" if family == socket.AF_INET else "=H6x16s"
    return struct.pack(layout, family, address).ljust(_ADDRESS_SIZE, b"\0")


def _address(pointer: object) -> int:
    return int(ffi.cast("uintptr_t", pointer))
