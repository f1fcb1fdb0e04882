"""lazyproc checkpoint: a process tree into CRIU-format images."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import (
    Commands,
    add_directory,
    add_json,
    add_pid_or_qemu,
    add_tcp_close,
    command,
)

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Event, Listener


def add(commands: Commands) -> None:
    parser = command(commands, run, "checkpoint", "write a process tree into CRIU-format images and end it")
    add_pid_or_qemu(parser)
    add_directory(parser, "folder for the images, made unless it is there")
    parser.add_argument("--leave-running", action="store_true", help="let the tree run on afterwards")
    add_tcp_close(parser)
    add_json(parser)
    parser.set_defaults(when_interrupted="interrupted; the process runs on as before")


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    from pathlib import Path

    import lazyproc
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import StepDone
    from lazyproc.show.reports import checkpoint_text, guest_checkpoint_text, report_fields

    def listen(event: Event) -> None:
        args.settled |= isinstance(event, StepDone) and event.name == "checkpoint"
        listener(event)

    directory = Path(args.directory)
    if args.qemu is not None:
        if args.tcp_close:
            raise lazyproc.errors.UsageError("a guest is saved as a whole", remedy="leave out --tcp-close")
        saved = lazyproc.checkpoint_guest(
            args.qemu, directory, leave_running=args.leave_running, listener=listen
        )
        return Outcome(guest_checkpoint_text(saved, args.directory), report_fields(saved))
    report = lazyproc.checkpoint(
        args.pid,
        directory,
        leave_running=args.leave_running,
        tcp_close=args.tcp_close,
        listener=listen,
    )
    return Outcome(checkpoint_text(report, args.directory), report_fields(report))
