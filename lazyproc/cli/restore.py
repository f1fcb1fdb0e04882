"""lazyproc restore: a process tree out of images, its pages at once or when they are touched."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lazyproc.cli.options import (
    HOST_PORT,
    Commands,
    add_directory,
    add_drain,
    add_insecure,
    add_json,
    add_site,
    command,
    endpoint,
)

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.restore.run import Restored

POLL_S = 1.0
# Everything a shell or a supervisor sends to the command is meant for the tree.
FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH")


def add(commands: Commands) -> None:
    parser = command(commands, run, "restore", "build a process tree from images and let it run")
    add_directory(parser, "folder of images, lazyproc's or CRIU's")
    parser.add_argument("--lazy", action="store_true", help="bring pages when they are touched, the rest meanwhile")
    parser.add_argument(
        "--from",
        dest="peer",
        metavar=HOST_PORT,
        type=endpoint,
        help="take pages that are not in the images from this page server",
    )
    parser.add_argument("--detach", action="store_true", help="return when every page is there; the tree runs on")
    parser.add_argument("--pidfile", metavar="FILE", help="write the number of the root process to FILE")
    add_site(parser)
    add_drain(parser)
    parser.add_argument("--record", metavar="FILE", help="write the order of faults to FILE, for a later restore")
    add_insecure(parser)
    add_json(parser)
    parser.set_defaults(when_interrupted="interrupted; nothing has been restored")


def run(args: argparse.Namespace) -> int:
    """Without --detach: signals go to the root process, and its exit status is the command's."""
    from pathlib import Path

    import lazyproc
    from lazyproc.cli.listening import listening
    from lazyproc.show.reports import report_fields, restore_text
    from lazyproc.show.text import print_json

    with ExitStack() as stack:
        listener = stack.enter_context(listening(args))
        restored = stack.enter_context(lazyproc.restore(
            Path(args.directory),
            lazy=args.lazy,
            peer=args.peer,
            pidns=args.pidns,
            cgroup=args.cgroup,
            policy=args.policy,
            trace=Path(args.trace) if args.trace else None,
            record=Path(args.record) if args.record else None,
            insecure=args.insecure,
            listener=listener,
        ))
        with _forwarded(restored):
            if args.pidfile:
                Path(args.pidfile).write_text(f"{restored.root_pid}\n")
            status = 0 if args.detach else _status(restored.wait_root())
            while not restored.wait_drained(POLL_S):
                pass
        report = restored.report()
    if args.json:
        print_json(report_fields(report))
    elif args.detach:
        print(restore_text(report))
    return status
