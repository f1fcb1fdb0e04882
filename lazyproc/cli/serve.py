"""lazyproc serve: a process tree or a folder of images, for restores elsewhere."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_insecure, add_listen, add_policy, command, pid


def add(commands: Commands) -> None:
    parser = command(commands, run, "serve", "offer a process tree, or images, to `lazyproc restore --from` elsewhere")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("-D", dest="directory", metavar="DIR", help="folder of images, for any number of restores")
    target.add_argument(
        "pid", metavar="PID", type=pid, nargs="?", help="process tree, frozen when the first client has come"
    )
    add_listen(parser)
    add_policy(parser)
    add_insecure(parser)


def run(args: argparse.Namespace) -> int:
    """A tree until it has moved, images until interrupted, which is the ordinary end: exit 0."""
    from pathlib import Path

    from lazyproc.cli.listening import listening
    from lazyproc.migrate.server import serve_folder, serve_process
    from lazyproc.migrate.source import Order

    order = Order(policy=args.policy)
    with listening(args) as listener:
        try:
            if args.directory is None:
                serve_process(args.pid, args.listen, order, insecure=args.insecure, listener=listener)
            else:
                serve_folder(Path(args.directory), args.listen, order, insecure=args.insecure, listener=listener)
        except KeyboardInterrupt:
            return 0
    return 0
