"""`lazyproc-criu dump`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import lazyproc
from lazyproc.criu import inherited, places, scripts
from lazyproc.criu.log import INFO, WARNING, Log
from lazyproc.criu.parse import Given
from lazyproc.errors import UsageError
from lazyproc.events import Event, StateChanged

TIMEOUT_S = 10  # CRIU's default
_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def run(given: Given, log: Log) -> None:
    """The tree is ended, unless it is to be left; after an error it runs as before. Raises LazyprocError."""
    pid = given.number("tree", 0)
    if pid <= 0:
        raise UsageError("no process is named", where="dump", remedy="give its pid with --tree")
    if "lazy-pages" in given:
        _demand_only_lazy(given)
    stats = places.work(given) / "stats-dump"  # a folder that is none is said before anything is stopped
    scripts.run(given, log, "pre-dump", pid)
    report = _lazily(given, log, pid) if "lazy-pages" in given else _at_once(given, log, pid)
    _write_stats(stats, log, report)
    log.write(
        INFO,
        f"dumped {report.tasks} processes, {report.pages_total} pages, frozen for {report.frozen_ms:.1f} ms",
    )


def _write_stats(path: Path, log: Log, report: lazyproc.CheckpointReport) -> None:
    """The tree may have ended: a disk that is full now is no failure of the dump, as with CRIU."""
    try:
        with open(path, "wb", opener=places.private) as file:
            file.write(report.stats())
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        log.write(WARNING, f"{path}: cannot be written ({reason}); the dump is complete without it")


def _at_once(given: Given, log: Log, pid: int) -> lazyproc.CheckpointReport:
    with ExitStack() as stack:
        server = places.page_server(given) if "page-server" in given else None
        return lazyproc.checkpoint(
            pid,
            places.images(given),
            leave_running="leave-running" in given,
            leave_stopped="leave-stopped" in given,
            tcp_close="tcp-close" in given,
            keep_connections="tcp-established" in given,
            permits=_permits(given),
            timeout_ms=_timeout_ms(given),
            last=partial(scripts.run, given, log, "post-dump", pid),
            store=stack.enter_context(server.sending()) if server else None,
            listener=log,
        )


def _lazily(given: Given, log: Log, pid: int) -> lazyproc.CheckpointReport:
    """A client has all the pages, and the tree may run there."""
    from lazyproc.migrate.criu_dump import LISTENING, LazyDump, dump_lazily

    def hear(event: Event) -> None:
        log(event)
        if isinstance(event, StateChanged) and event.state == LISTENING:
            places.say_ready(given)

    order = LazyDump(
        pid,
        places.images(given),
        tcp_close="tcp-close" in given,
        keep_connections="tcp-established" in given,
        permits=_permits(given),
        timeout_ms=_timeout_ms(given),
        address=places.peer(given),
        insecure=places.insecure(given),
        tls=places.tls(given),
    )
    last = partial(scripts.run, given, log, "post-dump", pid)
    alone = partial(places.close_status, given)
    return dump_lazily(order, last=last, alone=alone, listener=hear)


def _demand_only_lazy(given: Given) -> None:
    reasons = {
        "leave-running": "the tree would run in two places",
        "leave-stopped": "the tree would run in two places",
        "page-server": "the lazy pages are given from here, and the others lie in the folder",
    }
    for option in given.values.keys() & reasons:
        where = f"--lazy-pages --{option}"
        raise UsageError(reasons[option], where=where, remedy="leave one of them out")


def _timeout_ms(given: Given) -> int:
    return 1000 * given.number("timeout", TIMEOUT_S)


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
