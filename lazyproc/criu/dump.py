"""`lazyproc-criu dump`."""

from __future__ import annotations

from functools import partial

import lazyproc
from lazyproc.criu import inherited, places, scripts
from lazyproc.criu.log import INFO, Log
from lazyproc.criu.parse import Given
from lazyproc.errors import UsageError

TIMEOUT_S = 10  # CRIU's default
_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def run(given: Given, log: Log) -> None:
    """The tree is ended, unless it is to be left; after an error it runs as before. Raises LazyprocError."""
    pid = given.number("tree", 0)
    if pid <= 0:
        raise UsageError("no process is named", where="dump", remedy="give its pid with --tree")
    scripts.run(given, log, "pre-dump")
    report = lazyproc.checkpoint(
        pid,
        places.images(given),
        leave_running="leave-running" in given,
        leave_stopped="leave-stopped" in given,
        tcp_close="tcp-close" in given,
        keep_connections="tcp-established" in given,
        permits=_permits(given),
        timeout_ms=1000 * given.number("timeout", TIMEOUT_S),
        last=partial(scripts.run, given, log, "post-dump"),
        listener=log,
    )
    (places.work(given) / "stats-dump").write_bytes(report.stats())
    log.write(
        INFO,
        f"dumped {report.tasks} processes, {report.pages_total} pages, frozen for {report.frozen_ms:.1f} ms",
    )


def _permits(given: Given) -> lazyproc.Permits:
    return lazyproc.Permits(
        connections="tcp-established" in given or "tcp-close" in given,
        locks="file-locks" in given,
        led_from_outside="shell-job" in given,
        ghost_limit=_size(given.last("ghost-limit", "1M")),
        net_apart="network-lock" not in given,
        outside=True,
        datagrams_out="ext-unix-sk" in given,
        external=frozenset(inherited.external(given)),
    )


def _size(text: str) -> int:
    """Bytes, with a suffix K, M or G. Raises UsageError."""
    factor = _SUFFIXES.get(text[-1:].upper(), 0)
    try:
        return int(text[:-1] if factor else text) * (factor or 1)
    except ValueError:
        raise UsageError(
            f"{text!r} is no size", where="--ghost-limit", remedy="give bytes, or 64K, 1M, 1G"
        ) from None
