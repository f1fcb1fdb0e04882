"""Standard input, output and error. One that is closed, full or read by nobody ends no work and no exit code: a process
that has moved has moved, whoever hears of it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable


def prepare() -> None:
    """Where one is closed (`2>&-`) what we open next would get its number, and what is printed would go there. File
    names may be bytes that the terminal has no letters for: they are escaped, as standard error does.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # by number: each takes the lowest
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def give_up(fd: int) -> None:
    """What is left in the buffer has nowhere to go, and Python would exit with 120 for it."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, fd)
    os.close(null)


def say(text: str) -> None:
    """A line on standard error, where that can be had."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        give_up(2)


def answered(answer: Callable[[], None]) -> bool:
    """Whether `answer` could print to standard output; otherwise it is said why, but to a reader who has left."""
    try:
        answer()
    except BrokenPipeError:
        give_up(1)
    except OSError as error:
        give_up(1)
        say(f"lazyproc: standard output: the result cannot be written: {error.strerror}")
    else:
        return True
    return False
