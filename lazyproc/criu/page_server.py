"""`lazyproc-criu page-server`: stores the pages of a dump, or gives images to a lazy-pages daemon, CRIU's or ours."""

from __future__ import annotations

import os

import lazyproc
from lazyproc.criu import places
from lazyproc.criu.log import Log
from lazyproc.criu.parse import Given
from lazyproc.migrate.order import Order


def run(given: Given, log: Log) -> None:
    """Returns when the dump is complete, or the daemon has all it wants. Raises LazyprocError."""

    def ready() -> None:
        places.write_pidfile(given, os.getpid())
        places.say_ready(given)

    lazyproc.serve(
        places.images(given),
        places.peer(given),
        Order(),
        insecure=places.insecure(given),
        tls=places.tls(given),
        once=True,
        ready=ready,
        receive="lazy-pages" not in given,
        listener=log,
    )
