"""lazyproc serve: a page server for lazyproc and CRIU."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_insecure, add_listen, command, pid


def add(commands: Commands) -> None:
    parser = command(commands, run, "serve", "give the pages of images, or of a process, to lazy restores elsewhere")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("-D", dest="directory", metavar="DIR", help="folder of images")
    target.add_argument(
        "pid", metavar="PID", type=pid, nargs="?", help="process tree, frozen when the first client comes"
    )
    add_listen(parser)
    add_insecure(parser)


def run(args: argparse.Namespace) -> int:
    """Until interrupted, which is the ordinary end: exit 0."""
    from pathlib import Path

    import lazyproc
    from lazyproc.cli.listening import listening

    target = args.pid if args.directory is None else Path(args.directory)
    with listening(args) as listener:
        try:
            lazyproc.serve(target, args.listen, insecure=args.insecure, listener=listener)
        except KeyboardInterrupt:
            return 0
    return 0
