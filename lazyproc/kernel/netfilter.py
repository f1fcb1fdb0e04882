"""Holding packets back with nftables while a connection is between two hosts.

A dropped packet is sent again by TCP; an answered one (RST) ends the connection, and an accepted one is lost
with the frozen socket. So from the freeze until the hand-over both hosts drop what belongs to the tree. One
table holds everything of a session, so removing the table removes every trace; a process of its own does
that when we are killed. The rules concern the network namespace of the calling thread and need
CAP_NET_ADMIN there and nft(8).
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, Self

from lazyproc.errors import HostLacks, PermissionDenied

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    import subprocess

PREFIX = "lazyproc_"
KEEP = b"keep\n"
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


def ruleset(table: str, flows: Iterable[Flow]) -> str:
    """The nft(8) script that drops the packets of `flows` in both directions, and nothing else."""
    rules = dict.fromkeys(line for flow in flows for line in _rules(_unmapped(flow)))
    inbound = "\n".join(text for direction, text in rules if direction == "in")
    outbound = "\n".join(text for direction, text in rules if direction == "out")
    return (
        f"table inet {table} {{\n"
        f"chain inbound {{ type filter hook prerouting priority {_BEFORE_CONNTRACK};\n"
        f"meta mark {MARK:#x} accept\n{inbound}\n}}\n"
        f"chain outbound {{ type filter hook output priority {_BEFORE_CONNTRACK};\n"
        f"meta mark {MARK:#x} accept\n{outbound}\n}}\n}}\n"
    )


def _unmapped(flow: Flow) -> Flow:
    """On the wire ::ffff:a.b.c.d is IPv4."""
    return Flow(flow.protocol, plain(flow.local), plain(flow.remote) if flow.remote else None)


def plain(end: End) -> End:
    """An IPv4 address in IPv6 clothes (::ffff:a.b.c.d) as it is on the wire."""
    address, port = end
    return (address[12:], port) if address[:12] == bytes(10) + b"\xff\xff" else end


def _rules(flow: Flow) -> Iterator[tuple[str, str]]:
    for direction, here, there in (("in", "d", "s"), ("out", "s", "d")):
        protocol = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}[flow.protocol]
        match = f"{protocol} {here}port {flow.local[1]}"
        if any(flow.local[0]):
            match = f"{_address(flow.local[0], here)} {match}"
        if flow.remote is not None:
            match += f" {_address(flow.remote[0], there)} {protocol} {there}port {flow.remote[1]}"
        yield direction, f"{match} counter drop"


def _address(address: bytes, side: str) -> str:
    if len(address) == 4:
        return f"ip {side}addr {socket.inet_ntop(socket.AF_INET, address)}"
    return f"ip6 {side}addr {socket.inet_ntop(socket.AF_INET6, address)}"


def hold(session: str, flows: Iterable[Flow]) -> str:
    """Start dropping, at once for all flows; the table's name, for `release`. Replaces an earlier hold of
    the session.

    Raises HostLacks without nft(8) or nf_tables, PermissionDenied without CAP_NET_ADMIN.
    """
    if not _SESSION.fullmatch(session):
        raise ValueError(f"{session!r} cannot be part of a table's name")
    table = PREFIX + session
    _nft(f"add table inet {table}\ndelete table inet {table}\n{ruleset(table, flows)}")
    return table


def release(table: str) -> None:
    """Let the packets through again. A table that is not there is no error."""
    _nft(f"add table inet {table}\ndelete table inet {table}\n")


def release_session(session: str) -> None:
    """`release` of whatever is held back for it, by whomever; where nft is missing that is nothing."""
    with suppress(HostLacks):
        release(PREFIX + session)


class Hold:
    """A growing set of flows that are held back until `release`, or the end of the context."""

    def __init__(self, session: str) -> None:
        self.session = session
        self._flows: frozenset[Flow] = frozenset()
        self._sweeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release()

    def add(self, flows: Iterable[Flow]) -> None:
        """Hold these back too. nft(8) costs 15-25 ms, so it is called only for flows that are new."""
        wanted = self._flows.union(flows)
        if wanted != self._flows:
            if self._sweeper is None:
                self._sweeper = _sweeper(PREFIX + self.session)
            hold(self.session, wanted)
            self._flows = wanted

    def keep(self) -> None:
        """From now on our death lets nothing through: whoever ends the session calls `netfilter.release`."""
        if self._sweeper is not None:
            self._sweeper.communicate(KEEP)
            self._sweeper = None

    def keep_only(self, flows: Sequence[Flow]) -> None:
        """The same for these; all others come through again."""
        if flows:
            hold(self.session, flows)
            self.keep()
            self.forget()

    def forget(self) -> None:
        """What is kept is somebody else's to release."""
        self._flows = frozenset()

    def release(self) -> None:
        """Let everything through again."""
        if self._sweeper is not None:
            self._sweeper.communicate()
        elif self._flows:
            release(PREFIX + self.session)
        self._sweeper, self._flows = None, frozenset()


def _sweeper(table: str) -> subprocess.Popen[bytes]:
    """Removes the table when its input ends: when `communicate` says so, and when we are killed."""
    import subprocess

    words = 'read word; [ "$word" = keep ] || exec "$1" delete table inet "$2"'
    return subprocess.Popen(
        ["sh", "-c", words, "lazyproc-hold", _program(), table],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us
    )


@contextmanager
def held(session: str, flows: Iterable[Flow]) -> Iterator[str]:
    """`hold` for the length of a block."""
    with Hold(session) as kept:
        kept.add(flows)
        yield PREFIX + session


def leftovers() -> list[str]:
    """Tables that lazyproc made in this network namespace, of running and of killed sessions."""
    listed = (line.split() for line in _nft("list tables inet\n").splitlines())
    return [words[2] for words in listed if len(words) == 3 and words[2].startswith(PREFIX)]


def _program() -> str:
    import shutil

    program = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        raise HostLacks("nft is missing", where="nftables", remedy="install the package nftables")
    return program


def _nft(script: str) -> str:
    import subprocess  # a tree without connections does not need it

    done = subprocess.run([_program(), "-f", "-"], input=script, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout
    reason = done.stderr.strip().splitlines()[0] if done.stderr.strip() else f"exit status {done.returncode}"
    if "Operation not permitted" in reason:
        raise PermissionDenied(
            "the kernel refuses to hold packets back", where="nftables", remedy="run as root (CAP_NET_ADMIN)"
        )
    raise HostLacks(f"nft failed: {reason}", where="nftables", remedy="load the kernel module nf_tables")
