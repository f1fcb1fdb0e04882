"""lazyproc serve: a process tree or a folder of images, for restores elsewhere."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_insecure, add_listen, add_policy, command, pid


def add(commands: Commands) -> None:
    parser = command(
        commands, run, "serve", "offer a process tree, or images, to `lazyproc restore --from` elsewhere"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "-D", dest="directory", metavar="DIR", help="folder of images, for any number of restores"
    )
    target.add_argument(
        "pid", metavar="PID", type=pid, nargs="?", help="process tree, frozen when the first client has come"
    )
    add_listen(parser)
    add_policy(parser)
    add_insecure(parser)


def run(args: argparse.Namespace) -> int:
    """A tree until it has moved, images until interrupted, which is the ordinary end: exit 0."""
    from pathlib import Path

    import lazyproc
    from lazyproc.cli.listening import listening
    from lazyproc.migrate.source import Order

    target = args.pid if args.directory is None else Path(args.directory)
    with listening(args) as listener:
        try:
            lazyproc.serve(
                target, args.listen, Order(policy=args.policy), insecure=args.insecure, listener=listener
            )
        except KeyboardInterrupt:
            return 0
    return 0
