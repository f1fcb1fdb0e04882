"""lazyproc serve: a process tree or a folder of images, for restores elsewhere."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_listen, add_policy, add_trust, command, folder, pid, tls_of

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener


def add(commands: Commands) -> None:
    parser = command(
        commands, run, "serve", "offer a process tree, or images, to `lazyproc restore --from` elsewhere"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "-D",
        dest="directory",
        metavar="DIR",
        type=folder,
        help="folder of images, for any number of restores",
    )
    target.add_argument(
        "pid", metavar="PID", type=pid, nargs="?", help="process tree, frozen when the first client has come"
    )
    parser.add_argument(
        "--receive",
        action="store_true",
        help="with -D: store there what `criu dump --page-server` sends, once",
    )
    add_listen(parser)
    add_policy(parser)
    add_trust(parser)


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    """A tree until it has moved, images until interrupted; an interrupt is an ordinary end: exit 0."""
    from contextlib import suppress
    from pathlib import Path

    import lazyproc
    from lazyproc.cli.outcome import Outcome
    from lazyproc.migrate.order import Order

    if args.receive and args.directory is None:
        raise lazyproc.errors.UsageError("--receive stores pages in a folder", remedy="name it with -D")
    target = args.pid if args.directory is None else Path(args.directory)
    order = Order(policy=args.policy)
    with suppress(KeyboardInterrupt):
        lazyproc.serve(
            target,
            args.listen,
            order,
            insecure=args.insecure,
            tls=tls_of(args),
            receive=args.receive,
            listener=listener,
        )
    return Outcome()
