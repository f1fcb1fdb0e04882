"""lazyproc demo: the main job on this machine, between two hosts made of namespaces, verified."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, command

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener


def add(commands: Commands) -> None:
    command(commands, run, "demo", "move a process between two hosts on this machine, and verify it")


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    """Where two hosts cannot be had: what is missing, and the part that works without."""
    from lazyproc.cli.demonstration import in_place, move
    from lazyproc.cli.outcome import Outcome
    from lazyproc.errors import HostLacks
    from lazyproc.hosts import pair_of_hosts

    try:
        with pair_of_hosts() as pair:
            move(pair)
    except HostLacks as error:
        print(f"no move between two hosts: {error}\ninstead a checkpoint and a lazy restore, on this one:")
        in_place()
    return Outcome("verified")
