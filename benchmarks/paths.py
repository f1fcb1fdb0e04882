"""Every link with both of TCP's congestion controls: limits and delays, the same cargo over all of them, and beside it
what a bare C program pays for a page there. The C program also shows what the forwarder that makes the delays costs by
itself: over a delay of 0 ms."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from benchmarks.engines import ENGINES
from benchmarks.links import Take, floor, taken
from benchmarks.measure import Result
from benchmarks.toucher import LAZY, OURS, moved
from benchmarks.touching import MIB, Cargo
from benchmarks.wires import CONTROLS, Link

RATES = (None, "10gbit", "1gbit", "100mbit")
ROUND_TRIPS_MS = (0.1, 1.0, 10.0)
MOVED_MIB, STREAM_MIB = 24, 128
FLOOR_S = 0.3  # what all the pages of C's ping-pong may take
LINKS = tuple(
    Link(rate, delay, control)
    for rate, delay in (*((rate, None) for rate in RATES), *((None, delay) for delay in ROUND_TRIPS_MS))
    for control in CONTROLS
)
FORWARDERS = tuple(Link(None, delay) for delay in (0.0, *ROUND_TRIPS_MS))
UNITS = {"total": "ms", "blackout": "ms", "stream": "MB/s", "fault": "us"}


BESIDE_CRIU = (Link("1gbit"), Link("100mbit"), Link(None, 1.0))  # of 10 ms it takes half a minute


def _name(what: str, link: Link, engine: str = OURS) -> str:
    return f"{what}, {link.way}, {link.control}, {engine}"


def _move(engine: str, link: Link) -> Mapping[str, float]:
    reading = moved(ENGINES[engine], Cargo(mib=MOVED_MIB), link)
    return {
        _name("total", link, engine): reading.resident_ms,
        _name("blackout", link, engine): reading.blackout_ms,
        _name("fault p50", link, engine): reading.stall_p50_ms * 1e3,
        _name("fault p99", link, engine): reading.stall_p99_ms * 1e3,
    }


def _plain(link: Link) -> Mapping[str, float]:
    """C alone: a page asked for at a time, and a stream."""
    pages_mib = max(1, round(FLOOR_S / ((link.round_trip_ms or 0) / 1e3 + 5e-5) / 256))
    p50, _ = floor("fault", pages_mib, link)
    (took_ns,) = floor("bulk", STREAM_MIB, link)
    return {
        _name("fault p50", link, "C"): p50 / 1e3,
        _name("stream", link, "C"): STREAM_MIB * MIB / took_ns * 1e3,
    }


def run(rounds: int) -> Result:
    takes: list[Take] = [partial(_move, OURS, link) for link in LINKS]
    takes += [partial(_move, LAZY, link) for link in BESIDE_CRIU]
    takes += [partial(_plain, link) for link in (*(Link(control=each) for each in CONTROLS), *FORWARDERS)]
    samples = taken(rounds, UNITS, takes)
    return Result("every link, bbr and cubic", samples, ())
