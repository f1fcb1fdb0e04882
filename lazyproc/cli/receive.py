"""lazyproc receive: the destination of migrations."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import (
    Commands,
    add_cgroup,
    add_json,
    add_listen,
    add_own_policy,
    add_pidns,
    add_trust,
    command,
    tls_of,
    uid,
)

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener


def add(commands: Commands) -> None:
    parser = command(commands, run, "receive", "take in process trees that other hosts migrate")
    add_listen(parser)
    parser.add_argument("--once", action="store_true", help="end when one tree has come, with all its pages")
    add_pidns(parser)
    add_cgroup(parser)
    parser.add_argument(
        "--allow-uid",
        metavar="UID",
        type=uid,
        action="append",
        default=[],
        help="let this user of this host in, and take in only trees that run as such a user; "
        "may be given more than once",
    )
    parser.add_argument(
        "--overcommit", action="store_true", help="take in trees larger than the available memory"
    )
    add_own_policy(parser, "that of the source")
    add_trust(parser)
    add_json(parser)
    parser.add_argument(
        "command",
        metavar="-- qemu-system-x86_64 ...",
        nargs="*",
        help="take in guests of QEMU, each into one that is started so; the same command line as at the source",
    )


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    """Until interrupted, which is the ordinary end: exit 0. Trees that have come stay."""
    import lazyproc
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Event, StateChanged
    from lazyproc.migrate.arrival import Terms

    committed = 0

    def listen(event: Event) -> None:
        nonlocal committed
        committed += isinstance(event, StateChanged) and event.state == "committed"
        listener(event)

    try:
        lazyproc.receive(
            args.listen,
            Terms(
                args.pidns,
                args.overcommit,
                args.cgroup,
                frozenset(args.allow_uid),
                policy=args.policy,
                record=args.record,
                command=tuple(args.command),
            ),
            once=args.once,
            insecure=args.insecure,
            tls=tls_of(args),
            listener=listen,
        )
    except KeyboardInterrupt:
        if args.once:
            raise
    return Outcome(fields={"committed": committed})
