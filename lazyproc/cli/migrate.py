"""lazyproc migrate: a process tree to another host, its memory behind it."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import (
    HOST_PORT,
    Commands,
    add_insecure,
    add_json,
    add_pid,
    add_policy,
    command,
    count,
    endpoint,
)


def add(commands: Commands) -> None:
    parser = command(
        commands, run, "migrate", "move a process tree to another host, where `lazyproc receive` waits"
    )
    add_pid(parser)
    parser.add_argument("target", metavar=HOST_PORT, type=endpoint, help="where the receiver listens")
    parser.add_argument(
        "--mode",
        choices=("postcopy", "stopcopy"),
        default="postcopy",
        help="postcopy: the memory follows while it runs there; stopcopy: all of it first (default: %(default)s)",
    )
    parser.add_argument(
        "--max-rate",
        metavar="BYTES",
        type=count,
        default=0,
        help="bring what nobody waits for no faster, a second",
    )
    parser.add_argument("--no-bulk", action="store_true", help="bring only pages that are touched")
    add_policy(parser)
    add_insecure(parser)
    add_json(parser)
    parser.set_defaults(when_interrupted="interrupted; the process runs here as before")


def run(args: argparse.Namespace) -> int:
    """Returns when every page is at the destination."""
    import lazyproc
    from lazyproc.cli.listening import listening
    from lazyproc.migrate.source import Order
    from lazyproc.show.reports import migrate_text, report_fields
    from lazyproc.show.text import print_json

    order = Order(
        mode=args.mode, policy=args.policy, bulk=not args.no_bulk, max_rate=args.max_rate, trace=False
    )
    with listening(args) as listener:
        report = lazyproc.migrate(args.pid, args.target, order, insecure=args.insecure, listener=listener)
    if args.json:
        print_json(report_fields(report))
    else:
        print(migrate_text(report, args.pid, args.target))
    return 0
