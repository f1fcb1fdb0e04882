"""lazyproc check: what this host can do."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_json, command

CANNOT_BE_DONE = 3


def add(commands: Commands) -> None:
    add_json(command(commands, run, "check", "say what this host can do, and how to mend what it cannot"))


def run(args: argparse.Namespace) -> int:
    """Exit 0 when nothing that the main job needs is missing."""
    from lazyproc.host_check import State, check_host
    from lazyproc.show.findings import findings_fields, findings_text
    from lazyproc.show.text import print_json

    findings = check_host()
    if args.json:
        print_json(findings_fields(findings))
    else:
        print(findings_text(findings))
    return CANNOT_BE_DONE if any(finding.state is State.MISSING for finding in findings) else 0
