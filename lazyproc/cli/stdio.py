"""lazyproc stdio: what `migrate` to ssh:// runs on the other host."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, command, port

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener


def add(commands: Commands) -> None:
    words = "not for people: the far end of `migrate` to ssh://, on standard input and output"
    parser = command(commands, run, "stdio", words)
    parser.add_argument(
        "port",
        metavar="PORT",
        type=port,
        nargs="?",
        help="join the receiver there on 127.0.0.1; without it one is started for one tree",
    )


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.migrate.stdio import host_receiver, join

    if args.port is None:
        host_receiver(listener)
    else:
        join(args.port)
    return Outcome()
