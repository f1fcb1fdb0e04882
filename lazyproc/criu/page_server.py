"""`lazyproc-criu page-server --lazy-pages`: images for one lazy-pages daemon, ours or CRIU's."""

from __future__ import annotations

import os

import lazyproc
from lazyproc.criu import places
from lazyproc.criu.log import Log
from lazyproc.criu.parse import Given
from lazyproc.errors import UsageError
from lazyproc.migrate.source import Order


def run(given: Given, log: Log) -> None:
    """Returns when the daemon has all it wants. Raises LazyprocError."""
    if "lazy-pages" not in given:
        raise UsageError(
            "takes no pages yet",
            where="page-server",
            remedy="copy the folder of images, or serve it with --lazy-pages",
        )

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
        listener=log,
    )
