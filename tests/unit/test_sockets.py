"""What sockets need and no kernel: checksums, frames, rules, addresses, who listens again."""

from __future__ import annotations

import socket
import struct

from hypothesis import given
from hypothesis import strategies as st

from lazyproc.dump.peek import sockaddr
from lazyproc.kernel.inject import checksum
from lazyproc.kernel.netfilter import Flow, drops, plain
from lazyproc.migrate.address import arp_announcement, neighbour_advertisement

MAC = bytes.fromhex("020000000001")
MAPPED = bytes(10) + b"\xff\xff"


def _sum(data: bytes) -> int:
    """RFC 1071: what a receiver computes; 0xffff when the checksum is right."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@given(
    st.sampled_from([4, 16]).flatmap(
        lambda n: st.tuples(st.binary(min_size=n, max_size=n), st.binary(min_size=n, max_size=n))
    ),
    st.binary(max_size=100),
)
def test_a_receiver_finds_the_checksum_right(ends: tuple[bytes, bytes], payload: bytes) -> None:
    source, target = ends
    segment = bytes(2) + payload
    value = checksum(source, target, 17, segment)
    pseudo = source + target + struct.pack("!II", len(segment), 17)
    assert _sum(pseudo + struct.pack("!H", value) + payload + bytes(len(payload) % 2)) == 0xFFFF


def test_the_checksum_of_a_packet_from_the_wire() -> None:
    """A DNS-sized datagram 10.0.0.1:1000 to 10.0.0.2:53, computed by hand."""
    segment = struct.pack("!HHHH", 1000, 53, 12, 0) + b"abcd"
    words = 0x0A00 + 0x0001 + 0x0A00 + 0x0002 + 12 + 17 + 1000 + 53 + 12 + 0x6162 + 0x6364
    expected = ~((words & 0xFFFF) + (words >> 16)) & 0xFFFF
    assert checksum(bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), 17, segment) == expected


def test_the_gratuitous_arp_request() -> None:
    frame = arp_announcement(MAC, bytes([10, 0, 0, 7]))
    assert frame.hex(" ", 2) == (
        "ffff ffff ffff 0200 0000 0001 0806 0001 0800 0604 0001 0200 0000 0001 0a00 0007 0000 0000 0000 0a00 0007"
    )


def test_the_unsolicited_neighbour_advertisement() -> None:
    address = socket.inet_pton(socket.AF_INET6, "fd00::7")
    frame = neighbour_advertisement(MAC, address)
    ip, body = frame[14:54], frame[54:]
    assert frame[:14].hex() == "333300000001" + MAC.hex() + "86dd"
    assert (ip[6], ip[7], ip[8:24]) == (58, 255, address)
    assert body[:2] == bytes([136, 0])
    assert body[4:8] == bytes([0x20, 0, 0, 0])
    assert body[8:24] == address
    assert body[24:] == bytes([2, 1]) + MAC
    assert _sum(ip[8:40] + struct.pack("!II", len(body), 58) + body) == 0xFFFF


def test_a_flow_that_is_named_twice_is_dropped_by_one_rule_each_way() -> None:
    local, remote = (bytes([10, 0, 0, 1]), 80), (MAPPED + bytes([10, 0, 0, 2]), 4000)
    flows = [
        Flow(6, local, remote),
        Flow(17, (bytes(16), 53), None),
        Flow(6, (MAPPED + local[0], 80), remote),
    ]
    changes = list(drops("lazyproc_x", flows, owned=True))
    # The table; each chain, what passes, and two rules; the connections, and that there is one.
    assert len(changes) == 1 + 2 * (1 + 1 + 2) + 2
    assert changes == list(dict.fromkeys(changes))
    assert all(b"lazyproc_x\0" in change.attributes for change in changes)


@given(st.binary(min_size=4, max_size=4), st.integers(0, 65535))
def test_mapped_addresses_are_ipv4_on_the_wire(address: bytes, port: int) -> None:
    assert plain((MAPPED + address, port)) == (address, port) == plain((address, port))


def test_socket_addresses_are_the_kernels() -> None:
    assert sockaddr(2, ("1.2.3.4", 80)) == bytes([2, 0, 0, 80, 1, 2, 3, 4]) + bytes(8)
    six = sockaddr(10, ("fe80::1%lo", 80, 0, 1))
    assert (
        six
        == struct.pack("=H", 10)
        + struct.pack("!HI", 80, 0)
        + bytes.fromhex("fe80" + "0" * 27 + "1")
        + b"\1\0\0\0"
    )
    assert sockaddr(1, "/run/x") == b"\1\0/run/x"
    assert sockaddr(1, b"\0abstract") == b"\1\0\0abstract"
    assert sockaddr(1, None) == sockaddr(1, "") == b""
