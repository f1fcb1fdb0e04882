"""Packets with somebody else's sender address, handed to a socket of this host over the loopback interface.

That is how unread datagrams are put back, and how a FIN that was received before is received again. They
never leave the host: the destination is a local address. Layouts: RFC 791, 768, 9293, 8200; raw(7).
"""

from __future__ import annotations

import socket
import struct

from lazyproc.kernel.netfilter import MARK, End
from lazyproc.kernel.sockopt import SO_MARK, SOL_SOCKET

_FIN, _ACK = 0x01, 0x10
_TTL = 64


def datagram(source: End, target: End, payload: bytes) -> None:
    """A UDP datagram to `target`, an address of this host. EMSGSIZE, EPERM without CAP_NET_RAW."""
    length = 8 + len(payload)
    header = struct.pack("!HHHH", source[1], target[1], length, 0)
    value = checksum(source[0], target[0], socket.IPPROTO_UDP, header + payload)
    header = struct.pack("!HHHH", source[1], target[1], length, value or 0xFFFF)
    _send(source[0], target[0], socket.IPPROTO_UDP, header + payload)


def fin(source: End, target: End, seq: int, ack: int, window: int) -> None:
    """The FIN of the connection's peer `source`, with nothing else in it; `window` as it stands in the
    header.
    """

    def header(value: int) -> bytes:
        ports = (source[1], target[1])
        return struct.pack("!HHIIBBHHH", *ports, seq, ack, 5 << 4, _FIN | _ACK, window, value, 0)

    value = checksum(source[0], target[0], socket.IPPROTO_TCP, header(0))
    _send(source[0], target[0], socket.IPPROTO_TCP, header(value))


def checksum(source: bytes, target: bytes, protocol: int, segment: bytes) -> int:
    """The Internet checksum (RFC 1071) of a segment whose checksum field is 0, pseudo header included."""
    data = source + target + struct.pack("!II", len(segment), protocol) + segment + bytes(len(segment) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _send(source: bytes, target: bytes, protocol: int, segment: bytes) -> None:
    if len(target) == 4:
        family, host = socket.AF_INET, socket.inet_ntop(socket.AF_INET, target)
        # The kernel fills in the length, the identification and the header's checksum.
        header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, _TTL, protocol, 0, source, target)
    else:
        family, host = socket.AF_INET6, socket.inet_ntop(socket.AF_INET6, target)
        header = struct.pack("!IHBB16s16s", 6 << 28, len(segment), protocol, _TTL, source, target)
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.setsockopt(SOL_SOCKET, SO_MARK, MARK)
        raw.sendto(header + segment, (host, 0))
