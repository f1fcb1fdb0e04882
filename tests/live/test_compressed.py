"""Over a link that is the limit pages come compressed where they shrink, those that somebody waits for too."""

from __future__ import annotations

import os
import signal

from lazyproc.hosts import Pair
from lazyproc.model import PAGE
from tests.faults.helpers import DESTINATION, journal
from tests.live.moving import receiving
from tests.live.programs import running
from tests.live.real import ending, migrating

MIB = 32


def moved(pair: Pair, program: str, *options: str) -> dict[str, object]:
    """The report of a move of a program with MIB of memory that checks itself."""
    with (
        running(program, MIB, directory=pair.shared, host=pair.source, exclusive=True) as started,
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, started.pid, *options) as journey,
    ):
        new, report = journey.arrive()
        with ending(new):
            started.watch.wait_beats()
            os.kill(new, signal.SIGTERM)
            started.watch.wait_ended()
        return report


def test_text_over_a_slow_link(slow_pair: Pair) -> None:
    report = moved(slow_pair, "memory_text")
    packed, bulk, total, wire = (
        int(str(report[name])) for name in ("pages_packed", "pages_bulk", "pages_total", "bytes_wire")
    )
    assert total >= MIB << 20 >> 12
    assert 0 < packed <= bulk + int(str(report["pages_urgent"]))
    assert wire < total * PAGE - packed * PAGE / 2


def test_who_waits_over_a_slow_link(slow_pair: Pair) -> None:
    """Without bulk all pages are waited for."""
    with (
        running(
            "memory_text", 4, directory=slow_pair.shared, host=slow_pair.source, exclusive=True
        ) as started,
        receiving(slow_pair.destination) as receiver,
        migrating(slow_pair.source, receiver, started.pid, "--no-bulk") as journey,
    ):
        journey.wait_running()
        there = slow_pair.destination
        root = there.pid(journal(there, DESTINATION)["tree"]["root_pid"])
        with ending(root):
            os.kill(root, signal.SIGTERM)  # it looks at every page before it ends
            started.watch.wait_ended()
        report = journey.finish()
    urgent, packed = int(report["pages_urgent"]), int(report["pages_packed"])
    assert report["pages_bulk"] == 0
    assert urgent / 2 < packed < urgent


def test_what_does_not_shrink_comes_as_it_is(slow_pair: Pair) -> None:
    """All of it at its full size; of the program's own few pages some may shrink."""
    report = moved(slow_pair, "memory_random")
    assert int(str(report["bytes_wire"])) >= MIB << 20
