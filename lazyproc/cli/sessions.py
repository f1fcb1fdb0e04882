"""lazyproc sessions: what is under way or parked on this host."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_json, command

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener

FOLLOW_S = 0.5


def add(commands: Commands) -> None:
    parser = command(
        commands,
        run,
        "sessions",
        "list the migrations that are under way or parked on this host",
        only_tells=True,
    )
    parser.add_argument(
        "--follow", action="store_true", help="show them again at every change, until interrupted"
    )
    add_json(parser)


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    import time

    import lazyproc
    from lazyproc.cli.outcome import Outcome
    from lazyproc.show.sessions import sessions_fields, sessions_text
    from lazyproc.show.text import print_json

    found = lazyproc.sessions()
    while args.follow:
        print_json(sessions_fields(found)) if args.json else print(sessions_text(found), flush=True)
        before = found
        while found == before:
            time.sleep(FOLLOW_S)
            found = lazyproc.sessions()
    return Outcome(sessions_text(found), sessions_fields(found))
