"""The log of a command in CRIU's form, `(00.001234) Error (lazyproc): …`: its readers look for "Error" and "Warn"."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lazyproc.errors import CannotBeDone, UsageError
from lazyproc.events import Event, Note, StateChanged, StepDone

ERROR, WARNING, INFO, DEBUG = 1, 2, 3, 4
_PREFIXES = {ERROR: "Error (lazyproc): ", WARNING: "Warn  (lazyproc): ", INFO: "", DEBUG: ""}


class Log:
    """Lines up to a level, each written at once to a descriptor. An instance is a Listener.

    What cannot be written is left out: a full disk must not end what is being done, and says nothing of what was done.
    """

    def __init__(self, fd: int, level: int) -> None:
        self._fd = fd
        self._level = level
        self._began = time.monotonic()

    def __call__(self, event: Event) -> None:
        match event:
            case Note(text):
                self.write(WARNING, text)
            case StateChanged(state, _):
                self.write(INFO, state)
            case StepDone(name, _, seconds):
                self.write(DEBUG, f"{name}: {seconds * 1e3:.2f} ms")

    def write(self, level: int, text: str) -> None:
        """Each line of `text` on its own; errors are always written."""
        if level > max(self._level, ERROR):
            return
        seconds = time.monotonic() - self._began
        lines = (f"({seconds:09.6f}) {_PREFIXES[level]}{line}\n" for line in text.splitlines())
        with suppress(OSError):
            os.write(self._fd, os.fsencode("".join(lines)))  # a path may be no text

    def failed(self, error: BaseException) -> None:
        """Why a command has failed: each obstacle on a line, a fault of ours with where it was."""
        if isinstance(error, CannotBeDone):
            for obstacle in error.obstacles:
                self.write(ERROR, str(obstacle))
        else:
            self.write(ERROR, str(error) or type(error).__name__)
        if not isinstance(error, CannotBeDone | UsageError):
            from traceback import format_exception  # only for who reports it

            self.write(DEBUG, "".join(format_exception(error)))


@contextmanager
def opened(path: Path | None, level: int) -> Iterator[Log]:
    """A new log in the file `path`, which is nobody else's, otherwise on stderr. Raises UsageError."""
    if path is None and sys.stderr is not None:
        yield Log(sys.stderr.fileno(), level)
        return
    try:
        # Without a stderr: number 2 will be another file's.
        fd = os.open(path or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(
            f"the log cannot be written ({os.strerror(error.errno or 0).lower()})",
            where=str(path),
            remedy="see --work-dir",
        ) from None
    try:
        yield Log(fd, level)
    finally:
        os.close(fd)
