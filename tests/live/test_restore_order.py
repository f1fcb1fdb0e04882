"""What a lazy restore leaves for when the tree runs: which pages have content, and in which order they come."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyproc.events import Event, StateChanged
from lazyproc.restore.run import restore
from lazyproc.uffd.policy import POLICIES, Chunk, Extents, Policy, sequential
from tests.live.arrivals import leave


def test_the_policy_is_asked_once_and_when_the_tree_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave("memory_random", 64, 2, 100, directory=tmp_path)
    lazy = sum(extent.count for runs in left.checkpoint().memory.values() for extent in runs if extent.lazy)
    seen: list[str] = []

    def order(extents: Extents) -> Iterator[Chunk]:
        seen.append("asked")
        assert sum(extent.count for runs in extents.values() for extent in runs) == lazy
        return sequential(extents)

    def listener(event: Event) -> None:
        if isinstance(event, StateChanged):
            seen.append(event.state)

    monkeypatch.setitem(POLICIES, "watched", Policy(order))
    with restore(
        left.images, lazy=True, bulk=False, pidns="auto", policy="watched", listener=listener
    ) as restored:
        try:
            counters = restored.counters()
            assert counters is not None
            assert counters.total == counters.eager + lazy
            assert seen == ["running"]
            assert not restored.wait_drained(0.01)
            assert not restored.wait_drained(0.01)
            assert seen == ["running", "asked"]
            left.watch.wait_beats()
        finally:
            restored.forward(signal.SIGKILL)
            os.waitpid(restored.tree.nursery_pid, 0)
