"""The scene `qemu` of benchmarks: a guest is moved, and what is read of it can be."""

from __future__ import annotations

import pytest

from benchmarks.qemu import ENGINES, PREEMPT, moved
from benchmarks.toucher import OURS
from benchmarks.wires import WHOLE
from tests.qemu.guests import Shape


@pytest.mark.long
@pytest.mark.parametrize("who", [OURS, PREEMPT])
def test_a_guest_is_moved_and_read(who: str) -> None:
    reading = moved(ENGINES[who], WHOLE, Shape())
    assert 0 < reading.stop_to_run_ms < reading.copy_ms < reading.total_ms
    assert reading.longest_gap_ms > 5
