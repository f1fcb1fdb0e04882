"""What lies between two hosts: a veth, with a limit (tbf) where the link says so, or a wire with a length (delay.c)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.programs import program
from benchmarks.settings import allowed
from lazyproc.hosts import Host, Pair, give_addresses, ground, pair_of_hosts

BBR, CUBIC = "bbr", "cubic"
CONTROLS = (BBR, CUBIC)
BYTES_A_SECOND = {"10gbit": 1.25e9, "1gbit": 125e6, "100mbit": 12.5e6}


@dataclass(frozen=True, slots=True)
class Link:
    """`rate` in tc's units, None without a limit; `round_trip_ms` None without a delay of its own, and then it has no
    limit; `control` is TCP's congestion control at both ends."""

    rate: str | None = None
    round_trip_ms: float | None = None
    control: str = BBR

    @property
    def way(self) -> str:
        """The link in words, but for TCP's congestion control."""
        if self.round_trip_ms is not None:
            return f"{self.round_trip_ms:g} ms"
        return self.rate or "no limit"


WHOLE = Link()


@contextmanager
def hosts(link: Link = WHOLE) -> Iterator[Pair]:
    """A fresh source and destination, with the link between them."""
    with _linked(link) as pair:
        with allowed(link.control):
            for host in (pair.source, pair.destination):
                set_it = f"echo {link.control} > /proc/sys/net/ipv4/tcp_congestion_control"
                host.run(["sh", "-c", set_it], check=True)
        yield pair


@contextmanager
def _linked(link: Link) -> Iterator[Pair]:
    if link.round_trip_ms is None:
        with pair_of_hosts(link.rate) as pair:
            yield pair
        return
    with (
        ground() as floor,
        Host("source", floor, 1) as source,
        Host("destination", floor, 2) as destination,
        _delayed(source, destination, link.round_trip_ms),
    ):
        for host in (source, destination):
            give_addresses(host, "eth0")
        yield Pair(source, destination)


@contextmanager
def _delayed(one: Host, other: Host, round_trip_ms: float) -> Iterator[None]:
    """Both hosts have eth0, and a forwarder between the two holds every frame back for half the round trip."""
    spaces = (f"/proc/{host.init_pid}/ns/net" for host in (one, other))
    argv = [str(program("delay")), *spaces, "eth0", str(round(round_trip_ms * 5e5))]
    forwarder = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert forwarder.stdout is not None
        if forwarder.stdout.readline() != "ready\n":
            raise RuntimeError(f"the forwarder between two hosts: exit {forwarder.wait()}; it says why above")
        yield
    finally:
        forwarder.kill()
        forwarder.communicate()
