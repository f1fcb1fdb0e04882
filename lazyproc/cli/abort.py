"""lazyproc abort: end what is left of a session on this host."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_json, add_session, command

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener

LOST = 5


def add(commands: Commands) -> None:
    words = "end a session on this host, with its process tree and its helpers"
    parser = command(commands, run, "abort", words)
    add_session(parser)
    add_json(parser)


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    """Exit 5 when memory was missing, which is lost now."""
    import lazyproc
    from lazyproc.cli.outcome import Outcome
    from lazyproc.facts import asdict

    report = lazyproc.abort(args.session)
    return Outcome(report.text, asdict(report), LOST if report.pages_missing else 0)
