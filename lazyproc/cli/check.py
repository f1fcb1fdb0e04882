"""lazyproc check: what this host can do, and whether another one fits to it."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_json, add_peer, command, tls_of

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener

CANNOT_BE_DONE = 3


def add(commands: Commands) -> None:
    parser = command(
        commands, run, "check", "say what this host can do, and how to mend what it cannot", only_tells=True
    )
    add_peer(parser, "also whether trees of this host can move to the receiver there")
    add_json(parser)


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    """Exit 0 when nothing that the main job needs is missing, on either host."""
    from lazyproc.cli.outcome import Outcome
    from lazyproc.host_check import State, check_host
    from lazyproc.show.findings import findings_fields, findings_text

    tls = tls_of(args)
    findings = check_host()
    if args.peer:
        from lazyproc.migrate.check import check_peer

        findings += check_peer(args.peer, insecure=args.insecure, tls=tls)
    missing = any(finding.state is State.MISSING for finding in findings)
    return Outcome(findings_text(findings), findings_fields(findings), CANNOT_BE_DONE if missing else 0)
