"""Bulk over a link that is the limit comes compressed, where the pages shrink; faults never do."""

from __future__ import annotations

import os
import signal

from lazyproc.hosts import Pair
from lazyproc.model import PAGE
from tests.live.moving import receiving
from tests.live.programs import running
from tests.live.real import ending, migrating

MIB = 32


def moved(pair: Pair, program: str) -> dict[str, object]:
    """The report of a move of a program with MIB of memory that checks itself."""
    with (
        running(program, MIB, directory=pair.shared, host=pair.source, exclusive=True) as started,
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, started.pid) as journey,
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
    assert 0 < packed <= bulk
    assert wire < total * PAGE - packed * PAGE / 2


def test_what_does_not_shrink_comes_as_it_is(slow_pair: Pair) -> None:
    """All of it at its full size; of the program's own few pages some may shrink."""
    report = moved(slow_pair, "memory_random")
    assert int(str(report["bytes_wire"])) >= MIB << 20
