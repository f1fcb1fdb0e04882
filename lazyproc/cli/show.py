"""lazyproc show: what is in a folder of images."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_json, command, folder

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener


def add(commands: Commands) -> None:
    parser = command(
        commands,
        run,
        "show",
        "list the tasks, mappings, files and pages in a folder of images",
        only_tells=True,
    )
    parser.add_argument(
        "directory", metavar="DIR", type=folder, help="folder of images, lazyproc's or CRIU's"
    )
    add_json(parser)


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    from pathlib import Path

    from lazyproc.cli.outcome import Outcome
    from lazyproc.show.checkpoints import checkpoint_fields, checkpoint_text, read_checkpoint
    from lazyproc.show.guests import guest_fields, guest_text, read_guest

    guest = read_guest(Path(args.directory))
    if guest is not None:
        return Outcome(guest_text(guest), guest_fields(guest))
    checkpoint = read_checkpoint(Path(args.directory))
    return Outcome(checkpoint_text(checkpoint), checkpoint_fields(checkpoint))
