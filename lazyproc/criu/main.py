"""The entry point of `lazyproc-criu`: CRIU's command line, exit codes and log."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from lazyproc.criu import options, parse, places
from lazyproc.criu.log import DEBUG, ERROR, WARNING, Log, opened
from lazyproc.criu.parse import Given
from lazyproc.errors import UsageError
from lazyproc.limits import raise_limits

CRIU_VERSION = "4.2"  # whose command line this is
FAILED, MISUSED = 1, 2
Run = Callable[[Given, Log], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program's name. 0, 1 when it has failed, 2 when it is none."""
    try:
        given = parse.parse(sys.argv[1:] if argv is None else argv, os.environ)
        for number in given.every("close"):
            with suppress(OSError, OverflowError):
                os.close(int(number))
        if "help" in given or "version" in given:
            print(usage() if "help" in given else version())
            return 0
        verbosity = given.number("verbosity", WARNING)
    except (UsageError, ValueError) as error:
        return _said(error, MISUSED)
    try:
        with opened(None if given.command == options.CHECK else places.log(given), verbosity) as log:
            return _logged(given, log)
    except UsageError as error:  # there is no log
        return _said(error, FAILED)


def _said(error: Exception, code: int) -> int:
    print(f"Error (lazyproc): {error}", file=sys.stderr)
    return code


def _logged(given: Given, log: Log) -> int:
    """Whatever goes wrong is in the log."""
    raise_limits()
    log.write(DEBUG, f"{version()}\n{given.command} {dict(given.values)}")
    for name in parse.idle(given):
        log.write(DEBUG, f"--{name} has no meaning for {given.command}")
    refused = list(parse.refusals(given))
    if refused:
        log.write(ERROR, "\n".join(refused))
        return FAILED
    try:
        if (
            signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        ):  # start.py; from here on it is undone and logged
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _run(given.command)(given, log)
    except KeyboardInterrupt:
        log.write(ERROR, "interrupted")
        return FAILED
    except Exception as error:
        log.failed(error)
        return FAILED
    return 0


def _run(command: str) -> Run:
    """Imported when it runs: nobody waits for what another command needs."""
    from importlib import import_module

    run: Run = import_module(f"lazyproc.criu.{_MODULES[command]}").run
    return run


_MODULES: Mapping[str, str] = {
    options.CHECK: "check",
    options.DUMP: "dump",
    options.RESTORE: "restore",
    options.PAGE_SERVER: "page_server",
    options.LAZY_PAGES: "lazy_pages",
}


def version() -> str:
    from importlib.metadata import version as of

    return f"Version: {CRIU_VERSION}\nlazyproc {of('lazyproc')}"


def usage() -> str:
    lines = [f"usage: lazyproc-criu COMMAND [OPTION]...\n\ncommands: {', '.join(options.COMMANDS)}\n"]
    for names, _, kind, words in options.rows():
        lines.append(f"  {names}\n      {kind}: {words}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
