"""Options that several commands have, and the types of their arguments. Imports nothing heavy but argparse."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from lazyproc.cli.streams import say

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from typing import NoReturn, TypeVar

    from lazyproc import PageServerOfCriu, Tls
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
    Run = Callable[[argparse.Namespace, Listener], Outcome]
    _Found = TypeVar("_Found")
else:
    Commands = argparse._SubParsersAction

HOST_PORT = "HOST:PORT"
WRONG_USAGE = 2


class WrongUsage(SystemExit):
    """What argparse has refused; it has been said on standard error."""

    def __init__(self, words: str) -> None:
        super().__init__(WRONG_USAGE)
        self.words = words


class Parser(argparse.ArgumentParser):
    """Those of its commands are such parsers too."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.format_usage()}{self.prog}: error: {message}")
        raise WrongUsage(message)


class Formatter(argparse.HelpFormatter):
    """As wide as the terminal. argparse makes one for every option, and would import shutil (4 ms) for the width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


def _columns() -> int:
    """As shutil.get_terminal_size: $COLUMNS, the terminal's width, or 80."""
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told):
        return int(told)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


def command(
    commands: Commands, run: Run, name: str, words: str, *, only_tells: bool = False
) -> argparse.ArgumentParser:
    """A command with the options that all have. `words` say in the list of commands what it does; one that `only_tells`
    has done nothing when its result cannot be printed.
    """
    description = words[0].upper() + words[1:] + "."
    parser = commands.add_parser(
        name, help=words, description=description, allow_abbrev=False, formatter_class=Formatter
    )
    parser.set_defaults(
        run=run, json=False, when_interrupted="interrupted", settled=False, only_tells=only_tells
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say each step, and where an error came from"
    )
    parser.add_argument("--log-file", metavar="FILE", help="append all events to FILE, with the time")
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output, last")


def add_pid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pid", metavar="PID", type=pid, help="the root of the process tree")


def add_pid_or_qemu(parser: argparse.ArgumentParser) -> None:
    """One of them; see `of_pid_or_qemu`."""
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("pid", metavar="PID", type=pid, nargs="?", help="the root of the process tree")
    either.add_argument(
        "--qemu", metavar="QMP", help="the guest of the QEMU whose QMP monitor is this unix socket"
    )


def of_pid_or_qemu(
    args: argparse.Namespace, tree: Callable[..., _Found], guest: Callable[..., _Found]
) -> Callable[..., _Found]:
    """The work on a tree or on a guest, with what it is to be done on."""
    from functools import partial

    return partial(tree, args.pid) if args.qemu is None else partial(guest, args.qemu)


def add_directory(parser: argparse.ArgumentParser, words: str) -> None:
    parser.add_argument("-D", dest="directory", metavar="DIR", type=folder, required=True, help=words)


def add_listen(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen", metavar=HOST_PORT, type=endpoint, required=True, help="where to wait for clients"
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Who is let in: see `tls_of`."""
    for name, words in (
        ("cert", "TLS with the other end: our certificate, in PEM"),
        ("key", "its private key"),
        ("ca", "the certificate of the CA that must have signed the other end's; see `lazyproc keys`"),
    ):
        parser.add_argument(f"--tls-{name}", metavar="FILE", help=words)
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="talk to any host without encryption or proof of who it is; without it and TLS only to "
        "root and the same user on this one",
    )


def tls_of(args: argparse.Namespace) -> Tls | None:
    """What the options of `add_trust` say. Raises UsageError for some of the three, or for two ways at once."""
    import lazyproc

    given = [args.tls_cert, args.tls_key, args.tls_ca]
    if not any(given):
        return None
    if not all(given):
        raise lazyproc.errors.UsageError(
            "--tls-cert, --tls-key and --tls-ca belong together", remedy="give all three"
        )
    if args.insecure:
        raise lazyproc.errors.UsageError("--insecure and TLS exclude each other", remedy="give one of them")
    return lazyproc.Tls(*given)


def add_peer(parser: argparse.ArgumentParser, words: str) -> None:
    parser.add_argument("--peer", metavar=HOST_PORT, type=endpoint, help=words)
    add_trust(parser)


def add_session(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("session", metavar="ID", type=session, help="as `lazyproc sessions` shows it")


def add_retry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--retry-for",
        metavar="SECONDS",
        type=seconds,
        help="open a lost connection again for so long (default: without end)",
    )


def add_pidns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pidns",
        choices=("auto", "host", "new"),
        default="auto",
        help="pid namespace of the tree: this one, a new one, or (auto) a new one when one of its numbers is taken",
    )


def add_cgroup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cgroup",
        metavar="PATH",
        help="cgroup of the tree, as /proc/PID/cgroup has it, made when it is missing (default: a new one)",
    )


POLICIES = "sequential, smallest-first, around, stride, pivots or adaptive"


def add_policy(parser: argparse.ArgumentParser, default: str | None = "sequential", words: str = "") -> None:
    parser.add_argument(
        "--policy",
        metavar="NAME",
        default=default,
        help=f"what comes next that nobody waits for: {POLICIES} (default: {words or default})",
    )


def add_own_policy(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """Where the faults are, and a record of them may be."""
    parser.add_argument(
        "--policy",
        metavar="NAME",
        help=f"what comes next that nobody waits for: {POLICIES}; or recorded:FILE (default: {otherwise})",
    )
    parser.add_argument(
        "--record", metavar="FILE", help="write the faults to FILE, for a later --policy recorded:FILE"
    )


def add_pace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-rate",
        metavar="BYTES",
        type=count,
        default=0,
        help="bring what nobody waits for no faster, a second",
    )
    parser.add_argument("--no-bulk", action="store_true", help="bring only pages that are touched")


def add_older_criu(parser: argparse.ArgumentParser, beside: str) -> None:
    """`beside` are the options that name the page server."""
    parser.add_argument(
        "--criu-4.1",
        dest="older_criu",
        action="store_true",
        help=f"with {beside}: that CRIU is 4.1 or older, which nothing on the wire tells",
    )


def page_server_at(address: str | None, args: argparse.Namespace) -> PageServerOfCriu | None:
    if address is None:
        return None
    from lazyproc import PageServerOfCriu

    return PageServerOfCriu(address, args.older_criu, args.insecure, tls_of(args))


def add_tcp_close(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tcp-close", action="store_true", help="give up TCP connections to others; they are restored closed"
    )


def add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", metavar="FILE", help="write one record a page fault to FILE (docs/trace.md)"
    )


def folder(text: str) -> str:
    """An empty one is a variable that a script has not set, and not the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; the current folder is .")
    return text


def pid(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1 << 22:  # PID_MAX_LIMIT
        raise argparse.ArgumentTypeError(f"{text!r} is not a process number")
    return int(text)


def endpoint(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 0xFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is not {HOST_PORT}")
    return text


def destination(text: str) -> str:
    """HOST:PORT, or ssh://…, which whoever connects looks at more closely."""
    return text if text.startswith("ssh://") else endpoint(text)


def port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 0xFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def session(text: str) -> str:
    """Or of one side of it."""
    number = text.removesuffix("-source").removesuffix("-destination")
    if not number or set(number) - set("0123456789abcdefABCDEF"):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a session")
    return text


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def uid(text: str) -> int:
    if not text.isdecimal() or int(text) >= 0xFFFFFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is not a user number")
    return int(text)
