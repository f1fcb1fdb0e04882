"""What we write is nobody else's business, whatever the umask is: it holds the memory of processes, and secrets."""

from __future__ import annotations

import os
from pathlib import Path


def make_folder(path: Path) -> None:
    """The folder and those above it that are missing, 0700 each: who could rename one of them could replace all that is
    in it. Path.mkdir(parents=True) leaves those to the umask. One that is there stays as it is. Raises OSError.
    """
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """A file with that text, 0600 when it is new. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
