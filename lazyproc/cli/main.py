"""The entry point: parse, run one command, and turn what went wrong into one sentence and an exit code.

`lazyproc --help` must not import more than argparse: every command imports its work when it runs.
"""

from __future__ import annotations

import argparse
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
from lazyproc.cli.options import Formatter, Parser, WrongUsage
from lazyproc.cli.streams import answered, give_up, prepare, say

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
    whole = Parser(
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
    prepare()
    words = sys.argv[1:] if argv is None else argv
    try:
        return _obey(parser(words[0] if words and words[0] in NAMES else "").parse_args(words))
    except WrongUsage as wrong:
        if "--json" in words:
            _print_usage_error(wrong)
        raise


def _obey(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except KeyboardInterrupt:
        return _interrupted(args)
    except BrokenPipeError:  # whoever read what the command printed on its way has gone
        give_up(1)
        return FAILED
    except Exception as error:
        return _failed(error, args)


def _print_usage_error(wrong: WrongUsage) -> None:
    from lazyproc.show.text import print_json

    fields = {"error": wrong.words, "exit_code": wrong.code, "where": "", "remedy": "see --help"}
    answered(lambda: print_json(fields))


def _interrupted(args: argparse.Namespace) -> int:
    from lazyproc.show.text import print_json

    say(f"lazyproc: {args.when_interrupted}")
    if args.json:
        answered(lambda: print_json({"error": args.when_interrupted, "exit_code": FAILED}))
    return FAILED


def _run(args: argparse.Namespace) -> int:
    """The result is printed when the progress bar is out of the way. Its exit code stands whatever becomes of that,
    unless the result is all that the command is for.
    """
    from lazyproc.cli.listening import listening
    from lazyproc.limits import raise_limits

    raise_limits()
    with listening(args) as listener:
        outcome: Outcome = args.run(args, listener)
        args.settled = True  # an interrupt comes too late
    if not answered(lambda: _print(outcome, args)) and args.only_tells:
        return outcome.status or FAILED
    return outcome.status


def _print(outcome: Outcome, args: argparse.Namespace) -> None:
    from lazyproc.show.text import print_json, printable

    if args.json:
        print_json(outcome.fields)
    elif outcome.text:
        print(printable(outcome.text, keep=NEW_LINE), flush=True)


def _failed(error: Exception, args: argparse.Namespace) -> int:
    from lazyproc.show.failures import exit_code, failure_fields, failure_text
    from lazyproc.show.text import print_json, printable

    if args.verbose:
        import traceback

        say(printable("".join(traceback.format_exception(error)).rstrip(), keep=NEW_LINE))
    say(f"lazyproc: {printable(failure_text(error), keep=NEW_LINE)}")
    if args.json:
        answered(lambda: print_json(failure_fields(error)))
    return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
