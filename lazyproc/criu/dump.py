"""`lazyproc-criu dump`."""

from __future__ import annotations

from functools import partial

import lazyproc
from lazyproc.criu import places, scripts
from lazyproc.criu.log import INFO, Log
from lazyproc.criu.parse import Given
from lazyproc.errors import UsageError

TIMEOUT_S = 10  # CRIU's default


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
        timeout_ms=1000 * given.number("timeout", TIMEOUT_S),
        last=partial(scripts.run, given, log, "post-dump"),
        listener=log,
    )
    log.write(
        INFO,
        f"dumped {report.tasks} processes, {report.pages_total} pages, frozen for {report.frozen_ms:.1f} ms",
    )
