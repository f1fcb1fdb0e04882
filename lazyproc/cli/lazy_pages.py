"""lazyproc lazy-pages: the memory of a tree that `criu restore --lazy-pages` restores."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import (
    HOST_PORT,
    Commands,
    add_directory,
    add_json,
    add_older_criu,
    add_pace,
    add_policy,
    add_trust,
    command,
    endpoint,
    folder,
    page_server_at,
    tls_of,
)

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener


def add(commands: Commands) -> None:
    parser = command(
        commands, run, "lazy-pages", "bring the memory of a tree that `criu restore --lazy-pages` restores"
    )
    add_directory(parser, "folder of images, CRIU's or lazyproc's; criu restores from it as well")
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--page-server",
        metavar=HOST_PORT,
        type=endpoint,
        help="what the images call lazy comes from `criu dump --lazy-pages` or `criu page-server --lazy-pages` there",
    )
    place.add_argument(
        "--from",
        dest="peer",
        metavar=HOST_PORT,
        type=endpoint,
        help="pages that the images lack come from `lazyproc serve -D` there; an empty folder is filled first",
    )
    add_older_criu(parser, "--page-server")
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        type=folder,
        help="where lazy-pages.socket is made, as criu's --work-dir says (default: the folder of the images)",
    )
    add_pace(parser)
    add_policy(parser)
    add_trust(parser)
    add_json(parser)
    parser.set_defaults(when_interrupted="interrupted; nothing has been restored")


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    """Returns when all of it has come."""
    from pathlib import Path

    import lazyproc
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Note
    from lazyproc.show.reports import lazy_pages_text

    report = lazyproc.lazy_pages(
        Path(args.directory),
        peer=args.peer,
        page_server=page_server_at(args.page_server, args),
        insecure=args.insecure,
        tls=tls_of(args),
        work_dir=Path(args.work_dir) if args.work_dir else None,
        policy=args.policy,
        bulk=not args.no_bulk,
        max_rate=args.max_rate,
        ready=lambda: listener(Note("waiting for `criu restore --lazy-pages`")),
        listener=listener,
    )
    return Outcome(lazy_pages_text(report), report)
