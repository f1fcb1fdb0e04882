"""The entry point: parse, run one command, and turn what went wrong into one sentence and an exit code.

`lazyproc --help` must not import more than argparse: every command imports its work when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lazyproc.cli import (
    abort,
    check,
    checkpoint,
    demo,
    explain,
    keys,
    lazy_pages,
    migrate,
    qemu_serve,
    receive,
    restore,
    resume,
    serve,
    sessions,
    show,
    stdio,
)
from lazyproc.cli.options import Formatter

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome

COMMANDS = (
    check,
    explain,
    checkpoint,
    restore,
    serve,
    receive,
    migrate,
    sessions,
    resume,
    abort,
    lazy_pages,
    qemu_serve,
    show,
    keys,
    demo,
    stdio,
)
NAMES = tuple(module.__name__.rpartition(".")[2].replace("_", "-") for module in COMMANDS)
FAILED = 1
NEW_LINE = "\n"
EPILOG = (
    "exit codes: 0 done, 1 failed and the source runs as before, 2 wrong usage, 3 cannot be done (obstacles listed), "
    "4 goes on without this command, 5 memory lost after the hand-over"
)


def parser(only: str = "") -> argparse.ArgumentParser:
    """All commands and their options; or those of one command, which saves 3 ms of each start."""
    whole = argparse.ArgumentParser(
        prog="lazyproc",
        description="Move running Linux processes between hosts; their memory follows.",
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=Formatter,
    )
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for name, module in zip(NAMES, COMMANDS, strict=True):
        if only in ("", name):
            module.add(commands)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program's name. Returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    args = parser(words[0] if words and words[0] in NAMES else "").parse_args(words)
    try:
        return _run(args)
    except KeyboardInterrupt:
        return _interrupted(args)
    except BrokenPipeError:  # whoever read our output has gone; what remains in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except Exception as error:
        return _failed(error, args)


def _interrupted(args: argparse.Namespace) -> int:
    from lazyproc.show.text import print_json

    print(f"lazyproc: {args.when_interrupted}", file=sys.stderr)
    if args.json:
        print_json({"error": args.when_interrupted, "exit_code": FAILED})
    return FAILED


def _run(args: argparse.Namespace) -> int:
    """The result is printed when the progress bar is out of the way."""
    from lazyproc.cli.listening import listening
    from lazyproc.limits import raise_descriptor_limit
    from lazyproc.show.text import print_json, printable

    raise_descriptor_limit()
    with listening(args) as listener:
        outcome: Outcome = args.run(args, listener)
    if args.json:
        print_json(outcome.fields)
    elif outcome.text:
        print(printable(outcome.text, keep=NEW_LINE), flush=True)
    return outcome.status


def _failed(error: Exception, args: argparse.Namespace) -> int:
    from lazyproc.show.failures import exit_code, failure_fields, failure_text
    from lazyproc.show.text import print_json, printable

    if args.verbose:
        import traceback

        traceback.print_exception(error)
    print(f"lazyproc: {printable(failure_text(error), keep=NEW_LINE)}", file=sys.stderr)
    if args.json:
        print_json(failure_fields(error))
    return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
