"""The network between the hosts goes away and comes back: both notice, and it goes on by itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lazyproc.hosts import Host, Pair
from tests.faults.helpers import DESTINATION, SOURCE, journals
from tests.live.moving import receiving
from tests.live.programs import running, wait_until
from tests.live.real import ending, migrating

NOTICED_S = 15.0  # DEAD_S of migrate/talk.py, and time to say so
SLOW = ("--max-rate", "16000000")  # 4 seconds for 64 MiB


@contextmanager
def cut(host: Host) -> Iterator[None]:
    """No packet leaves or reaches the host: the other side hears nothing, no RST either."""
    drop = "chain {0} {{ type filter hook {0} priority 0; oifname != lo drop; }}"
    rules = "chain input { type filter hook input priority 0; iifname != lo drop; }\n" + drop.format("output")
    host.run(["nft", "-f", "-"], input=f"table inet cut {{\n{rules}\n}}\n", text=True, check=True)
    try:
        yield
    finally:
        host.run(["nft", "delete", "table", "inet", "cut"], check=True)


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(0.5, id="shorter than anybody's patience"),
        pytest.param(8.0, id="longer", marks=pytest.mark.long),
    ],
)
def test_the_network_goes_and_comes_back(pair: Pair, seconds: float) -> None:
    with (
        running(
            "memory_random", "64", "2", directory=pair.shared, host=pair.source, exclusive=True
        ) as program,
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, *SLOW) as journey,
    ):
        journey.wait_running()
        program.watch.wait_beats()
        with cut(pair.destination):
            time.sleep(seconds)
            if seconds > NOTICED_S / 2:
                wait_until(
                    lambda: "reconnecting" in journey.log().splitlines(), "the source notices", NOTICED_S
                )
                wait_until(
                    lambda: "the source is lost" in receiver.notes(), "so does the destination", NOTICED_S
                )
            assert program.watch.read().errors == 0
        new, _ = journey.arrive()
        with ending(new):
            program.watch.wait_beats()
            os.kill(new, signal.SIGTERM)
            program.watch.wait_ended()
    assert not journals(pair.source, SOURCE)
    assert not journals(pair.destination, DESTINATION)
