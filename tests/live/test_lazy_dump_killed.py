"""`dump --lazy-pages` whose worker is killed before the folder is its own."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from lazyproc.dump.permits import ALL
from lazyproc.errors import LazyprocError
from lazyproc.events import ignore
from lazyproc.migrate import criu_dump
from lazyproc.migrate.journal import records


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_images_that_were_there_before_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    earlier = tmp_path / "images" / "inventory.img"
    earlier.parent.mkdir()
    earlier.write_bytes(b"an earlier checkpoint")
    monkeypatch.setattr(criu_dump, "examine_again", _die)
    with subprocess.Popen(["sleep", "60"]) as sleep:
        try:
            order = criu_dump.LazyDump(
                sleep.pid,
                earlier.parent,
                tcp_close=False,
                keep_connections=False,
                permits=ALL,
                timeout_ms=1000,
                address="127.0.0.1:0",
                insecure=True,
            )
            with pytest.raises(LazyprocError, match="it runs as before"):
                criu_dump.dump_lazily(order, last=lambda: None, alone=lambda: None, listener=ignore)
            assert sleep.poll() is None
        finally:
            sleep.kill()
    assert earlier.read_bytes() == b"an earlier checkpoint"
    assert list(records()) == []
