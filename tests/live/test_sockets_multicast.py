"""Members of multicast groups, and sockets that are tied to an interface by its number: both go by its name."""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from lazyproc.errors import RestoreError
from lazyproc.hosts import Pair
from lazyproc.kernel import multicast
from lazyproc.kernel.sockopt import IP_UNICAST_IF, IPV6_MULTICAST_IF, IPV6_UNICAST_IF, SOL_IP, SOL_IPV6
from lazyproc.model import Checkpoint, InetSocket, Membership
from tests.live.moving import receiving, run_cli
from tests.live.programs import wait_until
from tests.live.real import ending, migrating
from tests.live.sockets import Network, dumped, ip, keep, made_sockets, obstacle_words, put

INET, INET6, DGRAM = socket.AF_INET, socket.AF_INET6, socket.SOCK_DGRAM
GROUP, GROUP6, PORT = "239.1.2.3", "ff02::fb", 5000
WIRE = "wire0"
OTHERS = 7  # interfaces that take the first numbers


def membership(
    family: int, group: str, interface: str = WIRE, *, only: bool = False, sources: tuple[str, ...] = ()
) -> Membership:
    packed = tuple(socket.inet_pton(family, each) for each in sources)
    return Membership(family, socket.inet_pton(family, group), interface, only, packed)


MEMBERSHIPS = {
    10: (membership(INET, GROUP),),
    11: (membership(INET6, GROUP6), membership(INET, GROUP)),
    12: (membership(INET, GROUP, sources=("10.9.0.8", "10.9.0.9")),),
    13: (membership(INET, "232.1.1.1", only=True, sources=("10.9.0.8",)),),
    14: (membership(INET6, GROUP6, only=True, sources=("fd00::8", "fd00::9")),),
    15: (membership(INET, GROUP), membership(INET, GROUP, "lo")),
    16: (membership(INET, "224.0.0.1"),),
    17: (),
}


@contextmanager
def wired(stack: ExitStack, before: int) -> Iterator[Network]:
    """A network with an interface WIRE, whose number is one of its own."""
    network = Network(stack)
    with network.inside():
        for number in range(before):
            ip(f"link add before{number} type veth peer name after{number}")
        ip(f"link add {WIRE} type veth peer name far0")
        ip(f"address add 10.9.0.1/24 dev {WIRE}")
        ip(f"address add fd00::1/64 dev {WIRE} nodad")
        ip(f"link set {WIRE} up")
        ip("link set far0 up")
        yield network


@pytest.fixture
def source() -> Iterator[Network]:
    with ExitStack() as stack, wired(stack, 0) as network:
        yield network


def members() -> None:
    for number, wanted in MEMBERSHIPS.items():
        families = {each.family for each in wanted}
        sock = put(number, socket.socket(INET6 if INET6 in families else INET, DGRAM))
        for each in wanted:
            multicast.join(sock, each)
        keep(sock)


def found_in(checkpoint: Checkpoint) -> dict[int, set[Membership]]:
    files = {row.fd: checkpoint.files[row.file_id].resource for row in checkpoint.root.descriptors}
    return {fd: set(each.memberships) for fd, each in files.items() if isinstance(each, InetSocket)}


def test_members_are_members_again_where_the_interface_has_another_number(source: Network) -> None:
    wanted = {number: set(each) for number, each in MEMBERSHIPS.items()}
    with dumped(members) as checkpoint:
        assert found_in(checkpoint) == wanted
        with ExitStack() as stack, wired(stack, OTHERS), made_sockets(checkpoint) as made:
            known = multicast.groups(made[10])
            assert {number: set(multicast.joined(sock, known)) for number, sock in made.items()} == wanted


def test_ties_are_to_the_interface_of_that_name(source: Network) -> None:
    options = (
        (10, INET, SOL_IP, IP_UNICAST_IF, ">I"),
        (11, INET6, SOL_IPV6, IPV6_UNICAST_IF, ">I"),
        (12, INET6, SOL_IPV6, IPV6_MULTICAST_IF, "=I"),
    )

    def body() -> None:
        for number, family, level, option, layout in options:
            sock = put(number, socket.socket(family, DGRAM))
            sock.setsockopt(level, option, struct.pack(layout, socket.if_nametoindex(WIRE)))
            keep(sock)
        keep(put(13, socket.socket(INET6, DGRAM)))

    here = socket.if_nametoindex(WIRE)
    with dumped(body) as checkpoint, ExitStack() as stack, wired(stack, OTHERS):
        there = socket.if_nametoindex(WIRE)
        assert there != here
        with made_sockets(checkpoint) as made:
            for number, family, level, option, layout in options:
                assert made[number].getsockopt(level, option, 4) == struct.pack(layout, there)
                if made[13].family == family:
                    assert made[13].getsockopt(level, option, 4) == bytes(4)


def test_an_interface_that_is_not_there_is_named(source: Network) -> None:
    with dumped(members) as checkpoint, ExitStack() as stack, Network(stack).inside():
        with pytest.raises(RestoreError, match="is not on this host") as caught, made_sockets(checkpoint):
            pass
        assert caught.value.where == f"interface {WIRE}"
        ip("link add far1 type veth peer name near1")
        for each in ("near1", "far1"):
            ip(f"link set {each} up")
        ip("address add 10.9.0.1/24 dev near1")
        ip(f"link property add dev near1 altname {WIRE}")  # as it says
        with made_sockets(checkpoint) as made:
            known = multicast.groups(made[10])
            assert [each.interface for each in multicast.joined(made[10], known)] == ["near1"]


def test_tied_to_an_interface_that_is_gone(source: Network) -> None:
    def body() -> None:
        ip("link add gone0 type veth peer name gone1")
        sock = put(10, socket.socket(INET, DGRAM))
        sock.setsockopt(SOL_IP, IP_UNICAST_IF, struct.pack(">I", socket.if_nametoindex("gone0")))
        ip("link delete gone0")
        keep(sock)

    assert obstacle_words(body) == [
        "fd 10: is tied to a network interface that is gone; let the program open the socket again"
    ]


MEMBER = f"""
import socket, struct, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", {PORT}))
sock.setsockopt(socket.SOL_IP, socket.IP_ADD_MEMBERSHIP,
                struct.pack("=4s4sI", socket.inet_aton("{GROUP}"), bytes(4), socket.if_nametoindex(sys.argv[2])))
log = open(sys.argv[1], "w", buffering=1)
print("listens", file=log)
while True:
    print(sock.recv(99).decode(), file=log)
"""
SEND = f"""
import socket, struct, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
by = struct.pack("=4s4sI", bytes(4), bytes(4), socket.if_nametoindex(sys.argv[1]))
sock.setsockopt(socket.SOL_IP, socket.IP_MULTICAST_IF, by)
sock.sendto(sys.argv[2].encode(), ("{GROUP}", {PORT}))
"""


def test_it_hears_the_group_where_it_is(pair: Pair) -> None:
    log = pair.shared / "heard"
    device = pair.source.run(
        ["ip", "-brief", "link"], check=True, capture_output=True, text=True
    ).stdout.splitlines()[-1].split("@")[0].split()[0]  # fmt: skip

    def send(words: str) -> None:
        pair.destination.run([sys.executable, "-c", SEND, device, words], check=True)

    argv = [sys.executable, "-c", MEMBER, str(log), device]
    program = pair.source.popen(argv, start_new_session=True)
    try:
        wait_until(lambda: log.exists() and "listens" in log.read_text(), "it listens")
        with (
            receiving(pair.destination) as receiver,
            migrating(pair.source, receiver, program.pid) as journey,
        ):
            new, _ = journey.arrive()
            with ending(new):
                send("from here")
                wait_until(lambda: "from here" in log.read_text(), "it hears the group")
                os.kill(new, signal.SIGKILL)
    finally:
        program.kill()
        program.wait()


def test_what_the_destination_lacks_is_known_before_the_freeze(pair: Pair) -> None:
    log = pair.shared / "heard"
    pair.source.run(["ip", "link", "add", WIRE, "type", "veth", "peer", "name", "far0"], check=True)
    pair.source.run(["ip", "link", "set", WIRE, "up"], check=True)
    program = pair.source.popen([sys.executable, "-c", MEMBER, str(log), WIRE], start_new_session=True)
    try:
        wait_until(lambda: log.exists() and "listens" in log.read_text(), "it listens")
        with receiving(pair.destination) as receiver:
            vpid = pair.source.vpid(program.pid)
            words = ("migrate", vpid, receiver.address, *receiver.trust)
            done = run_cli(pair.source, *words, expected=3)
            assert f"interface {WIRE}: is not on this host" in done.stderr
    finally:
        program.kill()
        program.wait()
