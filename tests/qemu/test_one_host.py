"""Two QEMUs on one host, of one command line: what both would have is told apart before it costs a guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyproc.errors import LazyprocError
from lazyproc.facts import replace
from lazyproc.hosts import Pair
from lazyproc.migrate.held_guest import HeldGuest
from lazyproc.qemu.guest import look
from tests.live.moving import receiving, run_cli
from tests.live.programs import wait_until
from tests.qemu.guests import Shape, beating, monitor
from tests.qemu.test_move import arrives, goes_on, moving

SMALL = Shape(memory=96, visited=16)
TMPFS = Path("/dev/shm")  # each test host has its own


def file_backed(path: Path) -> Shape:
    memory = ("-object", f"memory-backend-file,id=ram,size={SMALL.memory}M,mem-path={path},share=on")
    return replace(SMALL, options=(*memory, "-machine", "memory-backend=ram"))


def test_a_monitor_is_not_taken_away(pair: Pair) -> None:
    """That of the guest that is to move; with another path it moves."""
    host = pair.source
    with beating(SMALL, pair.shared, host=host) as guest:
        same = SMALL.command(guest.serial.path, guest.inside)
        refused = run_cli(
            host, "receive", "--listen", f"{host.address}:0", "--insecure", "--", *same, expected=2
        )
        assert f"{guest.inside}: another process listens there" in refused.stderr
        other = SMALL.command(guest.serial.path, host.scratch / "other")
        with receiving(host, "--", *other) as receiver, moving(pair, guest, receiver) as journey:
            arrives(guest, journey)


def test_whoever_has_taken_a_monitor_over_is_left_alone(tmp_path: Path) -> None:
    with beating(SMALL, tmp_path) as guest:
        with monitor(guest) as qmp:
            held = HeldGuest(look(qmp))
        before = guest.qmp.stat().st_ino
        inner = tmp_path / "inner"
        inner.mkdir()
        more = ("-qmp", f"unix:{guest.qmp},server=on,wait=off")
        with beating(SMALL, inner, *more) as other:
            wait_until(lambda: guest.qmp.stat().st_ino != before, "the path is another's")
            with pytest.raises(LazyprocError, match=f"pid {other.pid} has its path by now"):
                held.let_run()
            held.end()
            assert guest.process.wait(5) != 0
            goes_on(other.serial)


def test_the_file_that_is_the_ram_of_both_is_not_emptied(pair: Pair) -> None:
    """Nor is one of another filesystem than tmpfs, whose pages cannot be brought later, taken for one that can."""
    host = pair.source
    shape = file_backed(TMPFS / "ram")
    with beating(shape, pair.shared, host=host) as guest:
        command = shape.command(guest.serial.path, host.scratch / "other")
        with receiving(host, "--", *command) as receiver, moving(pair, guest, receiver) as journey:
            (obstacle,) = journey.finish(expected=3)["obstacles"]
            assert "is the same file in both QEMUs" in str(obstacle)
        goes_on(guest.serial)
        slow = file_backed(host.scratch / "ram").command(guest.serial.path, host.scratch / "third")
        with receiving(host, "--", *slow) as receiver, moving(pair, guest, receiver) as journey:
            assert "in a tmpfs" in journey.finish(expected=1)["error"]
        goes_on(guest.serial)
        own = file_backed(TMPFS / "own").command(guest.serial.path, host.scratch / "fourth")
        with receiving(host, "--", *own) as receiver, moving(pair, guest, receiver) as journey:
            arrives(guest, journey)
