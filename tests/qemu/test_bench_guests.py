"""The scene `qemu` of benchmarks: a guest is moved, and what is read of it can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.qemu import ENGINES, PREEMPT, moved
from benchmarks.toucher import OURS
from benchmarks.wires import WHOLE
from tests.qemu.guests import Shape, saved


@pytest.mark.long
@pytest.mark.parametrize("who", [OURS, PREEMPT])
def test_a_guest_is_moved_and_read(who: str, tmp_path: Path) -> None:
    shape = Shape()
    reading = moved(ENGINES[who], WHOLE, shape, saved(shape, tmp_path))
    assert 0 < reading.stop_to_run_ms < reading.copy_ms < reading.total_ms
    assert reading.longest_gap_ms > 5
