"""Telling the neighbours that an address lives here now.

A host that had the address's old Ethernet address in its cache would send there until the entry ages. A
gratuitous ARP request (RFC 5227) or an unsolicited neighbour advertisement (RFC 4861, 7.2.6) corrects
every cache, and teaches the switches the new port, in one packet.
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lazyproc.kernel.inject import checksum
from lazyproc.kernel.netfilter import Flow, plain

_SIOCGIFHWADDR = 0x8927
_ETH_P_ARP, _ETH_P_IPV6 = 0x0806, 0x86DD
_ALL_NODES = socket.inet_pton(socket.AF_INET6, "ff02::1")
_OVERRIDE = 0x20000000
_TARGET_LINK_ADDRESS = 2


_SIOCGIFCONF = 0x8912
_IFREQ = struct.Struct("16sHH4s16x")  # struct ifreq with a struct sockaddr_in
_MAX_ADDRESSES = 1024


@contextmanager
def announced(flows: list[Flow]) -> Iterator[None]:
    """Announce the addresses of moved connections that lie on an interface of this host (not loopback's), and work on
    before the socket is closed: that takes the kernel 7 to 15 ms (packet_release, synchronize_net).

    OSError: no CAP_NET_RAW.
    """
    addresses = {plain(flow.local)[0] for flow in flows}
    places = [(interface_of(address), address) for address in addresses]
    outside = [(name, address) for name, address in places if name is not None and name != "lo"]
    with ExitStack() as stack:
        if outside:
            link = stack.enter_context(_link())
        for name, address in outside:
            _announce(link, name, address)
        yield


def interface_of(address: bytes) -> str | None:
    """The interface that has a packed address, None when no interface has it (netdevice(7), /proc/net/if_inet6)."""
    if len(address) == 16:
        rows = (line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines())
        return next((row[5] for row in rows if bytes.fromhex(row[0]) == address), None)
    buffer = array.array("B", bytes(_IFREQ.size * _MAX_ADDRESSES))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        asked = struct.pack("ixxxxQ", len(buffer), buffer.buffer_info()[0])
        (length,) = struct.unpack_from("i", fcntl.ioctl(probe, _SIOCGIFCONF, asked))
    rows_v4 = _IFREQ.iter_unpack(bytes(buffer[:length]))
    return next((name.split(b"\0", 1)[0].decode() for name, _, _, ip in rows_v4 if ip == address), None)


def announce(interface: str, address: bytes) -> None:
    """Send the announcement for a packed IPv4 or IPv6 address. OSError: no such interface, no CAP_NET_RAW."""
    with _link() as link:
        _announce(link, interface, address)


def _link() -> socket.socket:
    return socket.socket(socket.AF_PACKET, socket.SOCK_RAW)


def _announce(link: socket.socket, interface: str, address: bytes) -> None:
    answer = fcntl.ioctl(link, _SIOCGIFHWADDR, struct.pack("16s16x", interface.encode()))
    mac = answer[18:24]
    frame = arp_announcement(mac, address) if len(address) == 4 else neighbour_advertisement(mac, address)
    link.sendto(frame, (interface, 0))


def arp_announcement(mac: bytes, address: bytes) -> bytes:
    """The Ethernet frame of a gratuitous ARP request: who has `address`, asked by itself."""
    arp = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, address, bytes(6), address)
    return b"\xff" * 6 + mac + struct.pack("!H", _ETH_P_ARP) + arp


def neighbour_advertisement(mac: bytes, address: bytes) -> bytes:
    """The Ethernet frame of an unsolicited neighbour advertisement to all nodes, overriding caches."""
    option = struct.pack("!BB6s", _TARGET_LINK_ADDRESS, 1, mac)
    body = struct.pack("!BBHI16s", 136, 0, 0, _OVERRIDE, address) + option
    value = checksum(address, _ALL_NODES, socket.IPPROTO_ICMPV6, body)
    body = body[:2] + struct.pack("!H", value) + body[4:]
    header = struct.pack("!IHBB16s16s", 6 << 28, len(body), socket.IPPROTO_ICMPV6, 255, address, _ALL_NODES)
    return b"\x33\x33\0\0\0\x01" + mac + struct.pack("!H", _ETH_P_IPV6) + header + body
