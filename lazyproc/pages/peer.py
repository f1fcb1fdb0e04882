"""Who is at the other end of a local connection, and whether he is let in.

Loopback is not trust: any user of the host can connect to a port on it. The kernel knows the uid of a local
peer's socket, so nobody has to prove it.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from lazyproc.errors import PermissionDenied, UsageError
from lazyproc.facts import dataclass
from lazyproc.pages.tls import OPTIONS, Tls

_Address = IPv4Address | IPv6Address

_ESTABLISHED = "01"  # include/net/tcp_states.h


@dataclass(frozen=True, slots=True)
class Trust:
    """Who is let in: root, our own user and `uids` on this host; with `tls` whoever has a certificate, and nobody else;
    if `insecure`, everybody from everywhere. Raises UsageError for both at once.
    """

    insecure: bool = False
    uids: frozenset[int] = frozenset()
    tls: Tls | None = None

    def __post_init__(self) -> None:
        if self.insecure and self.tls:
            raise UsageError(
                "--insecure lets everybody in, TLS only who has a certificate",
                remedy=f"leave out {OPTIONS} or it",
            )

    def facts(self) -> dict[str, object]:
        """For a journal."""
        return {
            "insecure": self.insecure,
            "uids": sorted(self.uids),
            "tls": self.tls.facts() if self.tls else None,
        }

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Trust:
        tls = facts.get("tls")
        return cls(
            bool(facts.get("insecure")), frozenset(facts.get("uids", ())), Tls.of(tls) if tls else None
        )

    def check(self, sock: socket.socket) -> None:
        """Of a connection without TLS. Raises PermissionDenied unless the peer of the connected socket is let in."""
        if self.insecure:
            return
        uid = peer_uid(sock)
        if uid is None:
            raise PermissionDenied(
                "the peer is not a process of this host that can be identified",
                where=peer_name(sock),
                remedy=f"use TLS ({OPTIONS}), or --insecure where everybody on the network may read "
                "and create processes",
            )
        if uid not in {0, os.geteuid()} | self.uids:
            raise PermissionDenied(
                f"the peer is uid {uid}",
                where=peer_name(sock),
                remedy=f"--allow-uid {uid} lets that user in",
            )


def peer_name(sock: socket.socket) -> str:
    """HOST:PORT, or what there is."""
    try:
        name = sock.getpeername()
    except OSError:
        return "peer that has gone"
    if sock.family == socket.AF_UNIX:
        return "unix peer"
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


def peer_uid(sock: socket.socket) -> int | None:
    """The uid that made the peer's socket; None for a peer on another host, and for one that is gone."""
    try:
        if sock.family == socket.AF_UNIX:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return int(struct.unpack("3i", credentials)[1])
        ours, theirs = _plain(sock.getsockname()), _plain(sock.getpeername())
    except OSError:
        return None
    if not theirs[0].is_loopback and theirs[0] != ours[0]:
        return None
    # Of this thread: another one may stand in another network namespace.
    for table, mapped in ("tcp", False), ("tcp6", True):
        pair = (_as_in_proc(*theirs, mapped=mapped), _as_in_proc(*ours, mapped=mapped))
        with open(f"/proc/thread-self/net/{table}") as lines:
            uid = find_uid(lines, *pair)
        if uid is not None:
            return uid
    return None


def find_uid(lines: Iterable[str], local: str, remote: str) -> int | None:
    """The owner of the connection in a table of /proc/net/tcp (net/ipv4/tcp_ipv4.c, get_tcp4_sock), line by line: it
    has one for every connection that strangers have opened and closed within a minute.

    Only an established socket that a process holds counts: after close(2) the kernel shows uid 0 and inode
    0 for what is left of it, and whoever sends his request and closes at once would be root.
    """
    for line in lines:
        columns = line.split()
        if columns[1] == local and columns[2] == remote:
            return int(columns[7]) if columns[3] == _ESTABLISHED and columns[9] != "0" else None
    return None


def _plain(name: tuple[str, int]) -> tuple[_Address, int]:
    """An IPv4 peer of a dual-stack socket is IPv4."""
    address = ip_address(name[0].partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address, name[1]


def _as_in_proc(address: _Address, port: int, *, mapped: bool) -> str:
    """32-bit words of the address in the machine's order, port in hexadecimal."""
    packed = address.packed
    if mapped and len(packed) == 4:
        packed = bytes(10) + b"\xff\xff" + packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
