"""netlink(7) sockets: those that travel are what they were, and hear from the kernel of the host that they are on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lazyproc.dump.descriptors import explain_descriptors, gather_descriptors
from lazyproc.errors import RestoreError
from lazyproc.hosts import Pair
from lazyproc.kernel.sockopt import NETLINK_LISTEN_ALL_NSID, SOL_NETLINK
from tests.live.descriptors import stopped
from tests.live.moving import receiving, run_cli
from tests.live.programs import running, wait_until
from tests.live.real import ending, migrating
from tests.live.sockets import Network, dumped, keep, made_sockets, obstacle_words, put, words

ROUTE, SOCK_DIAG, NETFILTER, GENERIC = 0, 4, 12, 16
LINK_GROUP = 1  # RTMGRP_LINK
PORT = 1 << 31 | 7


def netlink(protocol: int = ROUTE, port: int = PORT, groups: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    sock.bind((port, groups))
    return sock


@pytest.fixture
def network() -> Iterator[Network]:
    with ExitStack() as stack:
        yield Network(stack)


def test_it_hears_of_what_changes_where_it_is(pair: Pair) -> None:
    with (
        running("netlink", "hear", directory=pair.shared, host=pair.source, exclusive=True) as program,
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid) as journey,
    ):
        new, _ = journey.arrive()
        with ending(new):
            heard = program.watch.read().beats[1]
            pair.destination.run(["ip", "address", "add", "10.99.0.1/32", "dev", "lo"], check=True)
            wait_until(lambda: program.watch.read().beats[1] > heard, "it has heard of the address")
            os.kill(new, signal.SIGTERM)
            program.watch.wait_ended()
            assert program.watch.read().errors == 0, program.watch.read()


def test_a_port_that_somebody_has_there_is_known_before_the_freeze(pair: Pair) -> None:
    """Most often it is the number of the process that has it."""
    taken = pair.shared / "taken"
    script = (
        "import socket, sys, time; s = socket.socket(16, 3, 0); s.bind((int(sys.argv[1]), 0));"
        "open(sys.argv[2], 'x').close(); time.sleep(600)"
    )
    with (
        running("netlink", directory=pair.shared, host=pair.source, exclusive=True) as program,
        receiving(pair.destination) as receiver,
    ):
        port = pair.source.vpid(program.pid)
        holder = pair.destination.popen(["python3", "-c", script, str(port), str(taken)])
        try:
            wait_until(taken.exists, "the port is taken")
            done = run_cli(pair.source, "migrate", port, receiver.address, *receiver.trust, expected=3)
        finally:
            holder.kill()
            holder.wait()
        assert f"netlink socket of protocol 0: {port} is in use by another process" in done.stderr
        program.watch.wait_beats()
        program.stop_and_verify()


def test_a_port_that_was_taken_meanwhile_is_named(network: Network) -> None:
    with network.inside(), dumped(lambda: keep(put(10, netlink()))) as checkpoint:
        taken = f"{PORT} is in use by another process"
        with netlink(), pytest.raises(RestoreError, match=taken), made_sockets(checkpoint):
            pass
        with made_sockets(checkpoint) as made:
            assert made[10].getsockname() == (PORT, 0)


def test_unread_messages_are_of_this_kernel(network: Network) -> None:
    """They are read in a moment, so that only a dump minds them."""

    def body() -> None:
        sock = put(10, netlink(groups=LINK_GROUP))
        subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
        keep(sock)

    with network.inside(), stopped(body) as tasks:
        assert not explain_descriptors(tasks)
        gathered = gather_descriptors(tasks)
        with gathered.sockets:
            assert words(gathered) == [
                "fd 10: is a netlink socket with unread messages of this host's kernel; try again in a moment"
            ]


def test_what_the_kernel_keeps_more_for_cannot_travel(network: Network) -> None:
    def body() -> None:
        everywhere = put(12, netlink())
        everywhere.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
        keep(put(10, netlink(NETFILTER)), put(11, netlink(GENERIC)), everywhere)

    close = "close it before the move and open it again after it"
    kept = "what this host's kernel keeps for it cannot be read"
    with network.inside():
        assert obstacle_words(body) == [
            f"fd 10: is a netlink socket of protocol {NETFILTER}: {kept}; {close}",
            f"fd 11: is a netlink socket of protocol {GENERIC}: {kept}; {close}",
            f"fd 12: is a netlink socket that listens to other network namespaces; {close}",
        ]
