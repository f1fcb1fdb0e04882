"""What we write is nobody else's business, whatever the umask is: it holds the memory of processes, and secrets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def make_folder(path: Path) -> None:
    """The folder and those above it that are missing, 0700 each: who could rename one of them could replace all that is
    in it. Path.mkdir(parents=True) leaves those to the umask. One that is there stays as it is. Raises OSError.
    """
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def written_later(path: str | Path) -> Iterator[Callable[[str], None]]:
    """What writes a text to a file when there is one: that the file can be had is known before it is worth a text. 0600
    when it is new; without a text it is not there, or as it was. Raises OSError.
    """
    new = not os.path.lexists(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    written = False

    def write(text: str) -> None:
        nonlocal written
        written = True
        with suppress(OSError):  # a pipe has no length
            os.ftruncate(fd, 0)
        os.write(fd, os.fsencode(text))

    try:
        yield write
    finally:
        os.close(fd)
        if new and not written:
            os.unlink(path)
