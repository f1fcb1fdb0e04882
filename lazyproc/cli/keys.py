"""lazyproc keys: what two hosts need to talk in TLS."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_json, command, folder

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener
    from lazyproc.keys import Pair


def add(commands: Commands) -> None:
    parser = command(commands, run, "keys", "make a small CA and the keys of two hosts, for TLS between them")
    parser.add_argument("directory", metavar="DIR", type=folder, help="a new folder for them")
    parser.add_argument(
        "hosts", metavar="HOST", nargs=2, help="the name or address by which the other host calls it"
    )
    add_json(parser)


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    from pathlib import Path

    from lazyproc.cli.outcome import Outcome
    from lazyproc.keys import make_keys

    one, other = pairs = make_keys(Path(args.directory), tuple(args.hosts))
    text = (
        f"{one.host} gets {_names(one)}, {other.host} gets {_names(other)};\n"
        f"whoever has {one.ca.with_suffix('.key')} can make more: keep it off both hosts. Then for instance\n"
        f"  on {other.host}: lazyproc receive --listen {_bracketed(other.host)}:7070 {_options(other)}\n"
        f"  on {one.host}: lazyproc migrate PID {_bracketed(other.host)}:7070 {_options(one)}"
    )
    fields = [
        {"host": pair.host, "cert": str(pair.cert), "key": str(pair.key), "ca": str(pair.ca)}
        for pair in pairs
    ]
    return Outcome(text, {"hosts": fields})


def _names(pair: Pair) -> str:
    return f"{pair.cert.name}, {pair.key.name} and {pair.ca.name}"


def _options(pair: Pair) -> str:
    return f"--tls-cert {pair.cert} --tls-key {pair.key} --tls-ca {pair.ca}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
