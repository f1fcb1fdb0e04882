"""`lazyproc-criu restore`."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack

import lazyproc
from lazyproc.criu import inherited, places, scripts
from lazyproc.criu.log import INFO, WARNING, Log
from lazyproc.criu.parse import Given
from lazyproc.errors import LazyprocError, UsageError


def run(given: Given, log: Log) -> None:
    """The tree runs; not detached also until its root ends. Raises LazyprocError, and then nothing is left of it."""
    if "restore-sibling" in given and not _is_detached(given):
        raise UsageError(
            "waits for nothing: the root is a child of the caller",
            where="--restore-sibling",
            remedy="add --restore-detached",
        )
    handed = inherited.descriptors(given)
    scripts.run(given, log, "pre-restore")
    with ExitStack() as stack:
        daemon = stack.enter_context(_daemon(given)) if "lazy-pages" in given else None
        restored = stack.enter_context(_restored(given, log, daemon, handed))
        inherited.let_go({*handed.values()})
        log.write(INFO, f"restored; the root is pid {restored.root_pid}")
        _attempt(given, log, "post-resume", restored.root_pid)
        if not _is_detached(given):
            restored.wait_root()


def _is_detached(given: Given) -> bool:
    return bool({"restore-detached", "daemon"} & given.values.keys())


def _daemon(given: Given) -> socket.socket:
    from lazyproc.migrate.lazypages import dialled

    return dialled(places.work(given))


def _restored(
    given: Given, log: Log, daemon: socket.socket | None, handed: Mapping[str, int]
) -> AbstractContextManager[lazyproc.Restored]:
    def ready(root_pid: int) -> None:
        scripts.run(given, log, "post-restore", root_pid)
        places.write_pidfile(given, root_pid)
        _attempt(given, log, "pre-resume", root_pid)

    return lazyproc.restore(
        places.images(given),
        lazy=False,
        pidns="same",
        policy="sequential",
        stopped="leave-stopped" in given,
        ready=ready,
        lazy_pages=daemon,
        tcp_close="tcp-close" in given,
        given=handed,
        sibling="restore-sibling" in given,
        root=places.root(given),
        listener=log,
    )


def _attempt(given: Given, log: Log, action: str, root_pid: int) -> None:
    """The tree is whole: a script that fails now is said, and ends nothing."""
    try:
        scripts.run(given, log, action, root_pid)
    except LazyprocError as error:
        log.write(WARNING, str(error))
