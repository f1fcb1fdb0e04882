"""Waiting for several descriptors."""

from __future__ import annotations

import select
from collections.abc import Iterable


def readable(fds: Iterable[int], timeout: float | None = None) -> set[int]:
    """Those of `fds` that can be read, or have ended, at once or within `timeout` seconds (None: waits).

    By poll(2): select(2) knows no number over 1023, and a large tree takes more descriptors than that.
    """
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000)}
