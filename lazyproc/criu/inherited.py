"""What stays outside of a tree (--external), and the descriptors that a restore gives in its place (--inherit-fd)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from lazyproc.criu.parse import Given
from lazyproc.errors import UsageError

_FD = re.compile(r"(fd|debug)\[(\d+)\]:(.+)", re.DOTALL)
_EXTERNAL = re.compile(r"(?:file|tty|unix)\[[^\]]*\]")
_STDERR = 2


def external(given: Given) -> Iterator[str]:
    """The names of --external that lazyproc knows, without their values, which mean nothing for these kinds; and the
    sockets of --ext-unix-sk.
    """
    yield from (found[0] for found in map(_EXTERNAL.match, given.every("external")) if found)
    inodes = ",".join(given.every("ext-unix-sk")).split(",")
    yield from (f"unix[{inode}]" for inode in inodes if inode)


def descriptors(given: Given) -> dict[str, int]:
    """By the name of what each takes the place of: the first one of a name, as of CRIU. The text behind debug[N] is
    written to N. Raises UsageError.
    """
    found: dict[str, int] = {}
    for text in given.every("inherit-fd"):
        match = _FD.fullmatch(text)
        if match is None:
            raise UsageError("is not understood", where=f"--inherit-fd {text}", remedy="give fd[N]:NAME")
        kind, number, name = match.groups()
        try:
            os.fstat(int(number))
            if kind == "debug":
                os.write(int(number), os.fsencode(name))
        except (OSError, OverflowError) as error:
            reason = os.strerror(getattr(error, "errno", None) or 9).lower()
            raise UsageError(
                f"descriptor {number} is of no use ({reason})", where=f"--inherit-fd {text}",
                remedy="give one that is open",
            ) from None  # fmt: skip
        if kind == "fd":
            found.setdefault(name, int(number))
    return found


def let_go(numbers: set[int]) -> None:
    """They are the tree's alone now: a pipe that we hold too would never end."""
    for number in numbers:
        if number > _STDERR:
            os.close(number)
