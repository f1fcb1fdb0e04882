"""One redis, moved to and fro while a client writes: what it knows stays the same, and nobody who helps grows."""

from __future__ import annotations

import os
import re
import socket
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from lazyproc.hosts import Host, Trio
from lazyproc.migrate.address import announce
from tests.faults.helpers import DESTINATION, SOURCE, journals
from tests.live.moving import Receiver, receiving
from tests.live.programs import wait_until
from tests.live.real import dialled, ending, migrating, network_of, processes_of
from tests.live.real_redis import PORT, Connection, loaded, redis_server
from tests.live.test_move_real import SERVICE, give

KEYS = 100_000
SETTLED = 1  # by this move each receiver has taken it in once
MAX_GROWTH_KIB = 1024  # what the allocator may keep besides


@dataclass(frozen=True, slots=True)
class Size:
    """What a process has of its host."""

    kib: int  # anonymous memory
    descriptors: int
    mappings: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Size:
        status = dict(
            re.findall(r"^(RssAnon|Threads):\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
        )
        mappings = len(Path(f"/proc/{pid}/maps").read_text().splitlines())
        return cls(
            int(status["RssAnon"]), len(os.listdir(f"/proc/{pid}/fd")), mappings, int(status["Threads"])
        )

    def check(self, before: Size) -> None:
        assert self.kib - before.kib < MAX_GROWTH_KIB, f"{before} -> {self}"
        assert self.descriptors <= before.descriptors, f"{before} -> {self}"
        assert self.mappings <= before.mappings, f"{before} -> {self}"
        assert self.threads <= before.threads, f"{before} -> {self}"


def to_and_fro(trio: Trio, moves: int) -> dict[str, object]:
    """Raises AssertionError; else what was seen."""
    with ExitStack() as stack:
        give(trio.source, "add")
        redis, digest = stack.enter_context(redis_server(trio.source, KEYS))
        connection = Connection(dialled(trio.client, SERVICE, PORT))
        stack.callback(connection.close)
        hosts = (trio.source, trio.destination)
        receivers = [stack.enter_context(receiving(host)) for host in hosts]
        pid, batches = redis.pid, 0
        blackouts: list[float] = []
        sizes: list[list[Size]] = []
        mappings: list[int] = []
        for number in range(moves):
            here, there = hosts[number % 2], hosts[1 - number % 2]
            with loaded(connection) as load:
                wait_until(lambda: load.acknowledged > 20, "the client works")
                pid, blackout_ms = _move(here, there, receivers[1 - number % 2], pid)
                stack.enter_context(ending(pid))
                at_end = load.acknowledged
                wait_until(lambda: load.acknowledged > at_end + 20, "the client goes on")  # noqa: B023
            batches += load.acknowledged
            blackouts.append(blackout_ms)
            load.check_all()
            assert connection.call("DEBUG", "DIGEST") == digest, f"after move {number + 1}"
            for host in hosts:
                _check_idle(host)
            sizes.append([Size.of(each.process.pid) for each in receivers])
            mappings.append(Size.of(pid).mappings)
        for before, now in zip(sizes[SETTLED], sizes[-1], strict=True):
            now.check(before)
        return {
            "moves": moves,
            "batches_acknowledged": batches,
            "blackout_ms_max": round(max(blackouts), 1),
            "receivers_settled": [asdict(each) for each in sizes[SETTLED]],
            "receivers_at_the_end": [asdict(each) for each in sizes[-1]],
            "mappings_of_redis": [mappings[SETTLED], mappings[-1]],
        }


def _move(here: Host, there: Host, receiver: Receiver, pid: int) -> tuple[int, float]:
    """Its pid there, and how long it did not run."""
    give(there, "add")
    with migrating(here, receiver, pid, "--max-rate", "60000000") as journey:
        journey.wait_running()
        give(here, "del")
        with network_of(there):
            announce("eth0", socket.inet_aton(SERVICE))
        new, report = journey.arrive()
    return new, float(report["blackout_ms"])


def _check_idle(host: Host) -> None:
    """Every helper of the move has gone, and its records too."""

    def idle() -> bool:
        return not any(comm.startswith("lazyproc-") for comm in processes_of(host).values())

    wait_until(idle, f"nothing of the move is left at {host.name}")
    assert not journals(host, SOURCE)
    assert not journals(host, DESTINATION)
