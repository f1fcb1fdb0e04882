"""What one command does with the events of its work: the progress bar, the log, and when a signal may stop it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from lazyproc.events import Event, Listener, StateChanged
from lazyproc.show.progress import Progress, event_text

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def listening(args: argparse.Namespace, *, repeats: bool = False) -> Iterator[Listener]:
    """The listener for a command's work; on the way out the bar is closed and the last error logged.

    `repeats`: the work goes on after a hand-over, and a signal that came during one is heard when it is over.
    """
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(sys.stderr, verbose=args.verbose))
        log = stack.enter_context(_Log(args.log_file)) if args.log_file else None
        deafness = stack.enter_context(_Deafness(repeats))

        def listen(event: Event) -> None:
            deafness.hear(event)
            progress(event)
            if log is not None:
                log.write(event_text(event))

        yield listen


class _Log:
    """Lines of text with the time, appended to a file that only its owner can read."""

    def __init__(self, path: os.PathLike[str]) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(fd, "w", buffering=1)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            self.write(f"failed: {type(error).__name__}: {error}")
        self._file.close()

    def write(self, text: str) -> None:
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        self._file.write(f"{stamp}.{int(now % 1 * 1000):03}Z {text}\n")


class _Deafness:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, but not between `committed` and `drained`.

    In between nobody but this command can bring the missing pages.
    """

    def __init__(self, repeats: bool) -> None:
        self._repeats = repeats
        self._deaf = False
        self._kept = 0

    def __enter__(self) -> _Deafness:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:  # nohup(1)
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self._deaf:
            raise KeyboardInterrupt
        self._kept = number
        print("lazyproc: too late to stop: the hand-over is done, waiting for the last page", file=sys.stderr)

    def hear(self, event: Event) -> None:
        if not isinstance(event, StateChanged):
            return
        if event.state == "committed":
            self._deaf = True
        elif event.state == "drained" and self._repeats:
            self._deaf = False
            if self._kept:
                os.kill(os.getpid(), self._kept)
                self._kept = 0
