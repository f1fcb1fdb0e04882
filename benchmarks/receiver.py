"""How a scene calls lazyproc, and a `lazyproc receive` for one tree."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lazyproc.hosts import Pair

PORT = 7700
DEADLINE_S = 180


def lazyproc(*words: object) -> list[str]:
    return [sys.executable, "-m", "lazyproc.cli.main", *map(str, words)]


@contextmanager
def receiving(pair: Pair, *trust: str, command: Sequence[str] = ()) -> Iterator[str]:
    """Where it listens; at the end it has the tree, or the guest for which it starts `command`. Killed when the block
    fails.
    """
    address = f"{pair.destination.address}:{PORT}"
    receiver = pair.destination.popen(
        lazyproc(
            "receive", "--listen", address, "--once", *trust, "--json", *(["--", *command] if command else [])
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert receiver.stderr is not None
        for line in receiver.stderr:  # it says when it listens
            if "listening" in line:
                break
        yield address
        receiver.wait(DEADLINE_S)  # not for the end of its words: a QEMU that it has started speaks on
    finally:
        receiver.kill()
        receiver.wait()
