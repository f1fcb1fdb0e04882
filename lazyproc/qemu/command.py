"""The command line of a QEMU that is to take a guest in."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from lazyproc.errors import UsageError
from lazyproc.kernel.sockdiag import TCP_LISTEN, unix_sockets

NOT_WANTED = {
    "daemonize": "it outlives `receive` without it",
    "incoming": "lazyproc adds its own",
}


def demand_command(command: Sequence[str]) -> None:
    """Raises UsageError for one that cannot take a guest in."""
    if shutil.which(command[0]) is None:
        raise UsageError("is no program here", where=command[0], remedy="install QEMU, or give its path")
    for word in command[1:]:
        if word.startswith("-") and (why := NOT_WANTED.get(word.lstrip("-"))):
            raise UsageError(f"{word} is not wanted: {why}", where=command[0], remedy="leave it out")
    demand_own_paths(command)


def demand_own_paths(command: Sequence[str]) -> None:
    """Raises UsageError when somebody listens where this QEMU would: it takes the path away without a word (util/
    qemu-sockets.c unix_listen_saddr()), be it that of the monitor of the guest that is to move.
    """
    paths = [path for word in command for path in served(word) if Path(path).is_socket()]
    if not paths:
        return
    listening = {each.file for each in unix_sockets().values() if each.state == TCP_LISTEN}
    for path in paths:
        found = os.stat(path)
        if (found.st_ino & 0xFFFFFFFF, os.major(found.st_dev), os.minor(found.st_dev)) in listening:
            raise UsageError(
                "another process listens there, from which this QEMU would take the path away",
                where=path,
                remedy="give the QEMU that is to take guests in a path of its own",
            )


def served(word: str) -> Iterator[str]:
    """The paths of unix sockets at which QEMU is to listen by this word of its command line."""
    if re.search(r",server(?!=(?:off|no)\b)", word):
        yield from re.findall(r"(?:^unix:|[,:]path=)([^,]+)", word)
