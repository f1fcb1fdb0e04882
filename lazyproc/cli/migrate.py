"""lazyproc migrate: a process tree to another host, its memory behind it."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import (
    HOST_PORT,
    Commands,
    add_json,
    add_pace,
    add_pid_or_qemu,
    add_policy,
    add_retry,
    add_tcp_close,
    add_trace,
    add_trust,
    command,
    destination,
    of_pid_or_qemu,
    tls_of,
)

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Event, Listener


def add(commands: Commands) -> None:
    parser = command(
        commands, run, "migrate", "move a process tree to another host, where `lazyproc receive` waits"
    )
    add_pid_or_qemu(parser)
    parser.add_argument(
        "target",
        metavar=HOST_PORT,
        type=destination,
        help="where the receiver listens; or ssh://[USER@]HOST[:PORT], where one is started through ssh(1)",
    )
    parser.add_argument(
        "--mode",
        choices=("postcopy", "stopcopy"),
        default="postcopy",
        help="postcopy: the memory follows while it runs there; stopcopy: all of it first (default: %(default)s)",
    )
    add_retry(parser)
    parser.add_argument(
        "--release",
        action="store_true",
        help="free the memory here while it arrives there, so that both together hold one copy",
    )
    add_pace(parser)
    add_policy(parser, None, "sequential, of a guest pivots")
    add_tcp_close(parser)
    add_trace(parser)
    add_trust(parser)
    add_json(parser)
    parser.set_defaults(when_interrupted="interrupted; the process runs here as before")


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    """Returns when every page is at the destination."""
    import lazyproc
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import StateChanged
    from lazyproc.migrate.order import Order
    from lazyproc.show.reports import migrate_text, report_fields

    def listen(event: Event) -> None:
        if isinstance(event, StateChanged) and event.state == "running":
            args.settled = True  # whatever is pressed now, the pages follow
        listener(event)

    order = Order(
        mode=args.mode,
        policy=args.policy,
        bulk=not args.no_bulk,
        max_rate=args.max_rate,
        tcp_close=args.tcp_close,
        release=args.release,
    )
    move = of_pid_or_qemu(args, lazyproc.migrate, lazyproc.migrate_guest)
    report = move(
        args.target,
        order,
        insecure=args.insecure,
        tls=tls_of(args),
        listener=listen,
        retry_for=args.retry_for,
        trace=args.trace,
    )
    return Outcome(migrate_text(report, report.root_vpid, args.target), report_fields(report))
