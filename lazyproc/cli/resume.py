"""lazyproc resume: go on with a session that nobody works on any more."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_json, add_retry, add_session, command, folder

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener

LOST = 5


def add(commands: Commands) -> None:
    parser = command(commands, run, "resume", "go on with a migration whose processes on this host are gone")
    add_session(parser)
    parser.add_argument(
        "--from",
        dest="directory",
        metavar="DIR",
        type=folder,
        help="at the destination: missing pages come from these images",
    )
    parser.add_argument(
        "--poison",
        action="store_true",
        help="at the destination: missing pages that are in no images are lost, touching one is SIGBUS; exit 5",
    )
    parser.add_argument(
        "--here", action="store_true", help="at the source: the process runs on here; see --force"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="--here also when it is not known whether it runs on the other host: it could then run twice; --from "
        "also images of another moment; --from and --poison also when the source still answers",
    )
    add_retry(parser)
    add_json(parser)


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    """Returns when every page is at the destination, or at once with --here. Exit 5 when pages are lost."""
    from pathlib import Path

    import lazyproc
    from lazyproc.cli.outcome import Outcome
    from lazyproc.show.reports import resume_text

    directory = Path(args.directory) if args.directory else None
    report = lazyproc.resume(
        args.session,
        here=args.here,
        force=args.force,
        directory=directory,
        poison=args.poison,
        retry_for=args.retry_for,
        listener=listener,
    )
    if report is None:
        return Outcome(f"session {args.session}: it runs here again", {"session": args.session})
    return Outcome(resume_text(args.session, report), report, LOST if report.get("pages_poisoned") else 0)
