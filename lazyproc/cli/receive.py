"""lazyproc receive: the destination of migrations."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_insecure, add_json, add_listen, add_pidns, command, uid


def add(commands: Commands) -> None:
    parser = command(commands, run, "receive", "take in process trees that other hosts migrate")
    add_listen(parser)
    parser.add_argument("--once", action="store_true", help="end when one tree has come, with all its pages")
    add_pidns(parser)
    parser.add_argument(
        "--allow-uid",
        metavar="UID",
        type=uid,
        action="append",
        default=[],
        help="let this user of this host in, besides root and our own; may be given more than once",
    )
    parser.add_argument(
        "--overcommit", action="store_true", help="take in trees larger than the available memory"
    )
    add_insecure(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Until interrupted, which is the ordinary end: exit 0. Trees that have come stay."""
    import lazyproc
    from lazyproc.cli.listening import listening
    from lazyproc.events import Event, StateChanged
    from lazyproc.migrate.destination import Terms
    from lazyproc.show.text import print_json

    committed = 0
    with listening(args) as listener:

        def listen(event: Event) -> None:
            nonlocal committed
            committed += isinstance(event, StateChanged) and event.state == "committed"
            listener(event)

        try:
            lazyproc.receive(
                args.listen,
                Terms(args.pidns, args.overcommit),
                once=args.once,
                allow_uids=frozenset(args.allow_uid),
                insecure=args.insecure,
                listener=listen,
            )
        except KeyboardInterrupt:
            if args.once:
                raise
    if args.json:
        print_json({"committed": committed})
    return 0
