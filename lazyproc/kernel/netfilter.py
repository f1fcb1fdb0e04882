"""Holding packets back with nftables while a connection is between two hosts.

A dropped packet is sent again by TCP; an answered one (RST) ends the connection, and an accepted one is lost
with the frozen socket. So from the freeze until the hand-over both hosts drop what belongs to the tree. One
table holds everything of a session, so removing the table removes every trace; the kernel does that when we
are killed, since the table is owned by a socket of ours (NFT_TABLE_F_OWNER). The rules concern the network
namespace of the calling thread and need CAP_NET_ADMIN there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, Self

from lazyproc.errors import HostLacks
from lazyproc.kernel import nftables
from lazyproc.kernel.nftables import OUTPUT, PREROUTING, Change, Netfilter, new_chain, new_rule, new_table

PREFIX = "lazyproc_"
KEPT = "_kept"
DUMPED = "dump_"  # how the sessions of checkpoints begin
MARK = 0x6C70  # SO_MARK of packets that the restore itself injects; they pass
_BEFORE_CONNTRACK = -350  # NF_IP_PRI_RAW is -300: a packet held back leaves no conntrack entry either
End = tuple[bytes, int]  # packed address, port
_SESSION = re.compile(r"[A-Za-z0-9_]{1,32}")


class Flow(NamedTuple):
    """What belongs to one socket of this host. Addresses are packed; no `remote`: anybody's packets to
    `local`, whose address may be all zeros (any).
    """

    protocol: int  # IPPROTO_TCP or IPPROTO_UDP
    local: End
    remote: End | None


def drops(table: str, flows: Iterable[Flow], *, owned: bool) -> Iterator[Change]:
    """What makes a table that drops the packets of `flows` in both directions, and nothing else. A packet is looked up
    among the connections, of which a server has thousands, and compared with the other flows one by one.
    """
    rules: list[tuple[str, bytes]] = []
    ends: dict[tuple[int, int], list[bytes]] = defaultdict(list)  # by protocol and bytes of an address
    for flow in dict.fromkeys(map(_unmapped, flows)):
        if flow.remote is not None:
            ends[flow.protocol, len(flow.local[0])].append(nftables.ends_of(flow.local, flow.remote))
        else:
            rules += _rules(flow)
    yield new_table(table, owned=owned)
    for chain, hook in (("inbound", PREROUTING), ("outbound", OUTPUT)):
        yield new_chain(table, chain, hook, _BEFORE_CONNTRACK)
        yield new_rule(table, chain, (nftables.mark_is(MARK), nftables.verdict(accept=True)))
    for (protocol, length), known in ends.items():
        name = f"connections_{protocol}_{length}"
        yield from nftables.new_ends(table, name, known)
        for chain, inbound in (("inbound", True), ("outbound", False)):
            there = nftables.ends_are_in(name, four=length == 4, inbound=inbound)
            rules.append((chain, nftables.protocol_is(protocol) + there))
    for chain, match in dict.fromkeys(rules):
        yield new_rule(table, chain, (match, nftables.verdict(accept=False)))


def _unmapped(flow: Flow) -> Flow:
    """On the wire ::ffff:a.b.c.d is IPv4."""
    return Flow(flow.protocol, plain(flow.local), plain(flow.remote) if flow.remote else None)


# By the length of an address.
LOOPBACK = {4: bytes((127, 0, 0, 1)), 16: bytes(15) + b"\1"}


def plain(end: End) -> End:
    """An IPv4 address in IPv6 clothes (::ffff:a.b.c.d) as it is on the wire."""
    address, port = end
    return (address[12:], port) if address[:12] == bytes(10) + b"\xff\xff" else end


def is_loopback(end: End) -> bool:
    """Whether only this host can reach it: 127.0.0.0/8 or ::1."""
    host, _port = plain(end)
    return host == LOOPBACK[16] or (len(host) == 4 and host[0] == LOOPBACK[4][0])


def within_host(local: End, remote: End) -> bool:
    """Whether a connection is one of a host with itself: there the kernel takes the target's address for both ends
    (unless bind(2) has said another one).
    """
    return plain(local)[0] == plain(remote)[0] or (is_loopback(local) and is_loopback(remote))


def _rules(flow: Flow) -> Iterator[tuple[str, bytes]]:
    """Of what anybody may send to."""
    for chain, outbound in (("inbound", False), ("outbound", True)):
        match = nftables.protocol_is(flow.protocol) + nftables.port_is(flow.local[1], source=outbound)
        if any(flow.local[0]):
            match = nftables.address_is(flow.local[0], source=outbound) + match
        yield chain, match


def release_session(session: str) -> None:
    """Let through what is kept back for it, as a dump too, by whomever; where there is no nf_tables that is nothing."""
    with suppress(HostLacks), Netfilter() as netfilter:
        netfilter.change([nftables.destroy(PREFIX + name + KEPT) for name in (session, DUMPED + session)])


class Hold:
    """A growing set of flows that are held back until `release`, the end of the context, or our own, unless it is kept.

    Raises HostLacks without nf_tables, PermissionDenied without CAP_NET_ADMIN.
    """

    def __init__(self, session: str) -> None:
        if not _SESSION.fullmatch(session):
            raise ValueError(f"{session!r} cannot be part of a table's name")
        self.session = session
        self._table = PREFIX + session
        self._flows: frozenset[Flow] = frozenset()
        self._netfilter: Netfilter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release()
        if self._netfilter is not None:
            self._netfilter.close()
            self._netfilter = None

    def add(self, flows: Iterable[Flow]) -> None:
        """Hold these back too, in the network namespace in which the first were."""
        wanted = self._flows.union(flows)
        if wanted == self._flows:
            return
        if self._netfilter is None:
            self._netfilter = Netfilter()
        self._netfilter.change((nftables.destroy(self._table), *drops(self._table, wanted, owned=True)))
        self._flows = wanted

    def keep(self) -> None:
        """From now on our death lets nothing through: whoever ends the session calls `release_session`."""
        if self._netfilter is not None and self._flows:
            kept = drops(self._table + KEPT, self._flows, owned=False)
            self._netfilter.change((nftables.destroy(self._table + KEPT), *kept))

    def keep_only(self, flows: Iterable[Flow]) -> None:
        """The same for these of those that are held back; all others come through again."""
        kept, self._flows = self._flows.intersection(flows), frozenset()
        if self._netfilter is not None:
            rules = drops(self._table + KEPT, kept, owned=False) if kept else ()
            before = nftables.destroy(self._table), nftables.destroy(self._table + KEPT)
            self._netfilter.change((*before, *rules))

    def forget(self) -> None:
        """What is kept is somebody else's to release."""
        self._flows = frozenset()

    def release(self) -> None:
        """Let everything through again. The socket stays open: closing it right after takes the kernel's clean-up of
        the table, some ms.
        """
        if self._netfilter is not None and self._flows:
            self._netfilter.change([nftables.destroy(self._table), nftables.destroy(self._table + KEPT)])
        self._flows = frozenset()


@contextmanager
def held(session: str, flows: Iterable[Flow]) -> Iterator[str]:
    """Hold flows back for the length of a block; the table's name."""
    with Hold(session) as hold:
        hold.add(flows)
        yield PREFIX + session


def leftovers() -> list[str]:
    """Tables that lazyproc made in this network namespace, of running and of killed sessions.

    Raises HostLacks without nf_tables, PermissionDenied without CAP_NET_ADMIN.
    """
    with Netfilter() as netfilter:
        return [name for name in netfilter.tables() if name.startswith(PREFIX)]
