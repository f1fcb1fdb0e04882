"""lazyproc checkpoint: a process tree into CRIU-format images."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_directory, add_json, add_pid, command


def add(commands: Commands) -> None:
    parser = command(commands, run, "checkpoint", "write a process tree into CRIU-format images and end it")
    add_pid(parser)
    add_directory(parser, "folder for the images, made unless it is there")
    parser.add_argument("--leave-running", action="store_true", help="let the tree run on afterwards")
    parser.add_argument(
        "--tcp-close", action="store_true", help="give up TCP connections to others; they are restored closed"
    )
    add_json(parser)
    parser.set_defaults(when_interrupted="interrupted; the process runs on as before")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    import lazyproc
    from lazyproc.cli.listening import listening
    from lazyproc.show.reports import checkpoint_text, report_fields
    from lazyproc.show.text import print_json

    with listening(args) as listener:
        report = lazyproc.checkpoint(
            args.pid,
            Path(args.directory),
            leave_running=args.leave_running,
            tcp_close=args.tcp_close,
            listener=listener,
        )
    if args.json:
        print_json(report_fields(report))
    else:
        print(checkpoint_text(report, args.directory))
    return 0
