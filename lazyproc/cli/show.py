"""lazyproc show: what is in a folder of images."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_json, command


def add(commands: Commands) -> None:
    parser = command(commands, run, "show", "list the tasks, mappings, files and pages in a folder of images")
    parser.add_argument("directory", metavar="DIR", help="folder of images, lazyproc's or CRIU's")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from lazyproc.show.checkpoints import checkpoint_fields, checkpoint_text, read_checkpoint
    from lazyproc.show.text import print_json

    checkpoint = read_checkpoint(Path(args.directory))
    if args.json:
        print_json(checkpoint_fields(checkpoint))
    else:
        print(checkpoint_text(checkpoint))
    return 0
