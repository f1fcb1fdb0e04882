"""The firewall rules by which `criu dump --tcp-established` holds packets back, for whoever restores to take away.

By iptables it is two rules a connection, by nftables a table of the dump's own (criu/netfilter.c). On another host than
that of the dump there are none.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lazyproc.kernel.netfilter import End, Flow, plain

_MARK = "0xc114"  # SO_MARK of packets that pass, SOCCR_MARK of CRIU's
_PLACES = "/usr/sbin:/sbin:/usr/bin:/bin"


@contextmanager
def lifted(flows: Iterable[Flow], table: str) -> Iterator[None]:
    """Let the packets of these connections through; held back again when the block ends by an exception.

    `table` is the nftables table of the dump ("inet NAME"), "" for iptables. What is not there is no error.
    """
    undo = _lift_table(table) if table else [_again(rule) for rule in _rules(flows) if _run(rule)]
    try:
        yield
    except BaseException:
        for command, script in undo:
            _run(command, script)
        raise


Command = tuple[str, ...]


def _lift_table(table: str) -> list[tuple[Command, str]]:
    listed = subprocess.run(_found(("nft", "list", "table", *table.split())), capture_output=True, text=True)
    if listed.returncode or not _run(("nft", "delete", "table", *table.split())):
        return []
    return [(("nft", "-f", "-"), listed.stdout)]


def _rules(flows: Iterable[Flow]) -> Iterator[Command]:
    for flow in flows:
        if flow.remote is not None:
            local, remote = plain(flow.local), plain(flow.remote)
            yield _rule("INPUT", remote, local)
            yield _rule("OUTPUT", local, remote)


def _rule(chain: str, source: End, destination: End) -> Command:
    family, program = (socket.AF_INET, "iptables") if len(source[0]) == 4 else (socket.AF_INET6, "ip6tables")
    ends = (
        *("--source", socket.inet_ntop(family, source[0]), "--sport", str(source[1])),
        *("--destination", socket.inet_ntop(family, destination[0]), "--dport", str(destination[1])),
    )
    head = (program, "-w", "-t", "filter", "-D", chain, "--protocol", "tcp")
    return (*head, "-m", "mark", "!", "--mark", _MARK, *ends, "-j", "DROP")


def _again(rule: Command) -> tuple[Command, str]:
    return tuple("-I" if word == "-D" else word for word in rule), ""


def _run(command: Command, script: str = "") -> bool:
    """Whether it was there to be done; a program that is missing has made no rules."""
    found = _found(command)
    done = subprocess.run(found, input=script, capture_output=True, text=True) if found else None
    return done is not None and done.returncode == 0


def _found(command: Command) -> Command:
    program = shutil.which(command[0], path=_PLACES)
    return (program, *command[1:]) if program else ()
