"""lazyproc qemu-serve: a guest for a QEMU that waits for post-copy, with nothing of lazyproc's at that end."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_json, add_trust, command, folder, tls_of

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener


def add(commands: Commands) -> None:
    parser = command(
        commands, run, "qemu-serve", "let a saved or running guest go on at once in a QEMU that waits for it"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "-D",
        dest="directory",
        metavar="DIR",
        type=folder,
        help="folder of `checkpoint --qemu`; it stays as it is",
    )
    source.add_argument(
        "qmp", metavar="QMP", nargs="?", help="monitor of a running QEMU, which is stopped and quits"
    )
    parser.add_argument(
        "--to",
        dest="targets",
        action="append",
        metavar="HOST:PORT",
        required=True,
        help="where QEMU waits (-incoming), its capability postcopy-ram set; or unix:PATH. With -D more than once: the "
        "guest goes on in each",
    )
    parser.add_argument(
        "--recover",
        action="store_true",
        help="the guest runs there already and has lost its source; QEMU waits for another (migrate-recover)",
    )
    parser.add_argument(
        "--preempt",
        action="store_true",
        help="QEMU there has the capability postcopy-preempt: what the guest waits for has a connection of its own",
    )
    add_trust(parser)
    add_json(parser)


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    """Returns when every page is there."""
    from pathlib import Path

    import lazyproc
    from lazyproc.cli.outcome import Outcome
    from lazyproc.show.reports import guest_served_text, report_fields

    trust = {"preempt": args.preempt, "insecure": args.insecure, "tls": tls_of(args), "listener": listener}
    if len(args.targets) > 1:
        if args.directory is None or args.recover:
            raise lazyproc.errors.UsageError(
                "only a saved guest goes on in several QEMUs",
                remedy="name one --to, or a folder and no --recover",
            )
        clones = lazyproc.qemu_clone(Path(args.directory), args.targets, **trust)
        return Outcome(
            "\n".join(map(guest_served_text, clones)), {"guests": [report_fields(each) for each in clones]}
        )
    source = Path(args.directory) if args.directory else args.qmp
    report = lazyproc.qemu_serve(source, *args.targets, recover=args.recover, **trust)
    return Outcome(guest_served_text(report), report_fields(report))
