"""What a command does with the events of its work, and with the signals that are to stop it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from lazyproc.errors import LazyprocError
from lazyproc.events import Event, Listener, Note
from lazyproc.show.progress import Progress, event_text

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_S = 0.01


@contextmanager
def listening(args: argparse.Namespace) -> Iterator[Listener]:
    """The listener for a command's work: progress on standard error, and --log-file.

    SIGTERM and SIGHUP end the work like SIGINT, by KeyboardInterrupt: whoever is frozen runs on. Once the command has
    set `args.settled` they are ignored until its process ends: its exit code is to say what has happened.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if not args.settled:
            raise KeyboardInterrupt

    with ExitStack() as stack:
        progress = stack.enter_context(Progress(sys.stderr, verbose=args.verbose))
        log = stack.enter_context(_log(args.log_file, progress)) if args.log_file else None
        stack.enter_context(handling(interrupt, *INTERRUPTS))
        stack.enter_context(_said_again(interrupt))
        stack.enter_context(_deaf_once_settled(args))

        def listen(event: Event) -> None:
            progress(event)
            if log is not None:
                log(event_text(event))

        yield listen


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """`handler` for these signals, except for those that are ignored, before (nohup(1)) or since."""
    before = {number: signal.getsignal(number) for number in numbers}
    heard = [number for number, action in before.items() if action is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in heard:
            if signal.getsignal(number) is handler:
                signal.signal(number, before[number])


@contextmanager
def _said_again(interrupt: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """An interrupt that Python has dropped comes once more: it cannot raise out of a finalizer or the callback of a
    weak reference, which importlib has for each module (_get_module_lock), and only tells sys.unraisablehook.
    """
    before = sys.unraisablehook

    def dropped(what: sys.UnraisableHookArgs) -> None:
        if what.exc_type is KeyboardInterrupt:
            # Not at once: this is still within what cannot raise.
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        else:
            before(what)

    with handling(interrupt, signal.SIGALRM):
        sys.unraisablehook = dropped
        try:
            yield
        finally:
            sys.unraisablehook = before
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def _deaf_once_settled(args: argparse.Namespace) -> Iterator[None]:
    try:
        yield
    finally:
        if args.settled:
            for number in INTERRUPTS:
                signal.signal(number, signal.SIG_IGN)


@contextmanager
def _log(path: str, listener: Listener) -> Iterator[Callable[[str], None]]:
    """Appends lines with the time to a file that only its owner can read; the last one says what went wrong. A full
    disk ends the log, and not the work: `listener` is told. Raises LazyprocError when it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LazyprocError(
            f"the log cannot be written: {error.strerror}",
            where=path,
            remedy="name another file with --log-file",
        ) from None
    ended = False

    def write(text: str) -> None:
        nonlocal ended
        if ended:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        try:
            os.write(fd, f"{stamp}.{int(now % 1 * 1000):03}Z {text}\n".encode(errors="surrogateescape"))
        except OSError as error:
            ended = True
            listener(Note(f"{path}: the log ends here: {error.strerror}"))

    try:
        yield write
    except BaseException as error:
        write(f"failed: {type(error).__name__}: {error}")
        raise
    finally:
        os.close(fd)
