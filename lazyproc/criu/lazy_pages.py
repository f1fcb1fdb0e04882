"""`lazyproc-criu lazy-pages`: the daemon that brings what a lazy restore has left out, CRIU's or ours."""

from __future__ import annotations

import os

import lazyproc
from lazyproc.criu import places
from lazyproc.criu.log import INFO, Log
from lazyproc.criu.parse import Given


def run(given: Given, log: Log) -> None:
    """Returns when all of it has come. Raises LazyprocError."""

    def ready() -> None:
        places.write_pidfile(given, os.getpid())
        places.say_ready(given)

    report = lazyproc.lazy_pages(
        places.images(given),
        page_server=places.page_server(given) if "page-server" in given else None,
        work_dir=places.work(given),
        ready=ready,
        listener=log,
    )
    log.write(INFO, f"all pages are there: {dict(report)}")
