"""Words become options, as getopt_long(3) and CRIU's configuration files have it; and what cannot be honoured is said.

Pure, but for reading the configuration files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lazyproc.criu.options import (
    COMMANDS,
    REFUSED_COMMANDS,
    Kind,
    Option,
    lookup,
    row,
    short,
)
from lazyproc.errors import UsageError
from lazyproc.facts import dataclass, field

GLOBAL_FILE = "/etc/criu/default.conf"
USER_FILE = ".criu/default.conf"  # in $HOME
FILE_VARIABLE = "CRIU_CONFIG_FILE"
_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"|(\S+)')
_NUMBER = re.compile(r"\s*([+-]?\d+)")


@dataclass(frozen=True, slots=True)
class Given:
    """What was asked for: the values of each option in the order in which they came; "" where it has none."""

    command: str
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def last(self, name: str, default: str = "") -> str:
        """CRIU lets a later option win."""
        return self.values.get(name, (default,))[-1]

    def every(self, name: str) -> tuple[str, ...]:
        return self.values.get(name, ())

    def number(self, name: str, default: int) -> int:
        """Raises UsageError."""
        if name not in self.values:
            return default
        try:
            return int(self.last(name))
        except ValueError:
            raise UsageError(
                f"{self.last(name)!r} is no number", where=f"--{name}", remedy="give a whole number"
            ) from None


def parse(words: Sequence[str], environment: Mapping[str, str]) -> Given:
    """The command line without the program's name, and the files that come before it. Raises UsageError."""
    options, operands = scanned(words)
    command = _command(operands, options)
    before = list(_from_files(options, environment))
    values: dict[str, tuple[str, ...]] = {}
    verbosity = 0
    for option, value in (*before, *options):
        if option.name == "verbosity":
            verbosity = _verbosity(verbosity, value)
            values[option.name] = (str(verbosity),)
        elif value is None:  # --no-NAME
            values.pop(option.name, None)
        else:
            values[option.name] = (*values.get(option.name, ()), value)
    return Given(command, values)


def _command(operands: Sequence[str], options: Sequence[tuple[Option, str | None]]) -> str:
    asked = {option.name for option, _ in options}
    if not operands:
        if asked & {"help", "version"}:
            return ""
        raise UsageError(
            "no command is given", where="lazyproc-criu", remedy=f"give one of {', '.join(COMMANDS)}"
        )
    command, *others = operands
    if command in REFUSED_COMMANDS:
        raise UsageError("is not done by lazyproc-criu", where=command, remedy=REFUSED_COMMANDS[command])
    if command not in COMMANDS:
        raise UsageError("is no command", where=command, remedy=f"give one of {', '.join(COMMANDS)}")
    if others:
        raise UsageError(f"belongs to no option of {command}", where=others[0], remedy="leave it out")
    return command


def scanned(words: Sequence[str]) -> tuple[list[tuple[Option, str | None]], list[str]]:
    """Options with their values (None: taken back), and what is none, which may stand anywhere. Raises UsageError."""
    options: list[tuple[Option, str | None]] = []
    operands: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            operands += rest
            break
        if word.startswith("--"):
            options.append(_long(word[2:], rest))
        elif word.startswith("-") and word != "-":
            options += _cluster(word[1:], rest)
        else:
            operands.append(word)
    return options, operands


def _long(text: str, rest: list[str]) -> tuple[Option, str | None]:
    name, equals, value = text.partition("=")
    found = lookup(name)
    if found is None:
        raise UsageError("is no option", where=f"--{name}", remedy="see lazyproc-criu --help")
    option, negated = found
    if equals and (negated or not option.takes):
        raise UsageError("takes no value", where=f"--{name}", remedy="leave out the = and what follows")
    if negated:
        return option, None
    if option.takes and not option.optional and not equals:
        value = _next(f"--{name}", rest)
    return option, value


def _cluster(letters: str, rest: list[str]) -> Iterator[tuple[Option, str]]:
    """`-vd`, `-D dir`, `-Ddir`; what takes a value takes all that follows, so that -verbosity=0 is -v erbosity=0."""
    for at, letter in enumerate(letters):
        option = short(letter)
        if option is None:
            raise UsageError("is no option", where=f"-{letter}", remedy="see lazyproc-criu --help")
        if option.takes:
            value = letters[at + 1 :]
            yield option, value or ("" if option.optional else _next(f"-{letter}", rest))
            return
        yield option, ""


def _next(name: str, rest: list[str]) -> str:
    if not rest:
        raise UsageError("needs a value", where=name, remedy="see lazyproc-criu --help")
    return rest.pop(0)


def _verbosity(before: int, value: str | None) -> int:
    """As CRIU counts: -v is one more, -vvv are three, -v3 and -v=3 are what atoi(3) makes of them."""
    text = (value or "").removeprefix("=")
    if not text:
        return before + 1
    if text[0] == "v":
        return before + len(text) + 1
    number = _NUMBER.match(text)
    return int(number[1]) if number else 0


# --- configuration files ----------------------------------------------------------------------------------------


def _from_files(
    options: Sequence[tuple[Option, str | None]], environment: Mapping[str, str]
) -> Iterator[tuple[Option, str | None]]:
    names = [option.name for option, _ in options]
    paths = []
    if "no-default-config" not in names:
        paths += [GLOBAL_FILE, os.path.join(environment.get("HOME", "/"), USER_FILE)]
    paths += [environment[FILE_VARIABLE]] if FILE_VARIABLE in environment else []
    named = [value for option, value in options if option.name == "config" and value]
    for path in [path for path in paths if os.path.exists(path)] + named:
        try:
            lines = Path(path).read_text(errors="surrogateescape").splitlines()
        except OSError as error:
            raise UsageError(
                os.strerror(error.errno or 0).lower(), where=path, remedy="name a file that can be read"
            ) from None
        yield from configured(lines, path)


def configured(lines: Iterable[str], path: str) -> Iterator[tuple[Option, str | None]]:
    """The options of a file: the name of one on each line, without dashes, and its value, in quotes where it has
    spaces or #. Raises UsageError with the number of the line.
    """
    for number, line in enumerate(lines, 1):
        words = list(_words(line))
        if not words:
            continue
        name, values = words[0], words[1:]
        try:
            found = lookup(name.removeprefix("--"))
            if found is None or len(values) > 1:
                raise UsageError("is no option with one value", where=name, remedy="see lazyproc-criu --help")
            yield _long(f"{name.removeprefix('--')}={values[0]}" if values else name.removeprefix("--"), [])
        except UsageError as error:
            raise UsageError(
                error.what, where=f"{path}, line {number}, {error.where}", remedy=error.remedy
            ) from None


def _words(line: str) -> Iterator[str]:
    for match in _WORD.finditer(line):
        quoted, plain = match.groups()
        if plain is None:
            yield re.sub(r"\\(.)", r"\1", quoted)
        elif plain.startswith("#"):
            return
        else:
            yield plain


# --- what cannot be honoured ------------------------------------------------------------------------------------


def refusals(given: Given) -> Iterator[str]:
    """One sentence for each option that cannot be honoured by this command."""
    for name, values in given.values.items():
        option = row(name, given.command)
        if option is None or (option.values and all(value in option.values for value in values)):
            continue
        if option.kind is Kind.REFUSED or option.values:
            value = f" {values[-1]}" if values[-1] else ""
            yield f"--{name}{value} is not supported: {option.words}"


def idle(given: Given) -> Iterator[str]:
    """The options that have no meaning for this command; a configuration file is for all of them."""
    return (name for name in given.values if row(name, given.command) is None)
