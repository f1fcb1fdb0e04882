"""The clock of steps."""

from __future__ import annotations

import pytest

from lazyproc.steps import Steps


def test_steps_add_up_to_the_whole_and_keep_their_order() -> None:
    steps = Steps()
    for name in ("stop", "maps", "threads", "maps"):
        steps.done(name)
    assert list(steps.ms()) == ["stop", "maps", "threads"]
    assert min(steps.ms().values()) > 0
    assert sum(steps.ms().values()) == pytest.approx(steps.total_ms)
