"""lazyproc restore: a process tree out of images, its pages at once or when they are touched."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from lazyproc.cli.options import (
    HOST_PORT,
    Commands,
    add_cgroup,
    add_json,
    add_older_criu,
    add_own_policy,
    add_pidns,
    add_trace,
    add_trust,
    command,
    endpoint,
    folder,
    page_server_at,
    tls_of,
)

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lazyproc import Restored
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Event, Listener

POLL_S = 0.1
# What a shell or a supervisor sends to the command is meant for the tree.
FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH")


def add(commands: Commands) -> None:
    parser = command(commands, run, "restore", "build a process tree from images and let it run")
    parser.add_argument(
        "-D", dest="directory", metavar="DIR", type=folder, help="folder of images, lazyproc's or CRIU's"
    )
    parser.add_argument(
        "--from",
        dest="peer",
        metavar=HOST_PORT,
        type=endpoint,
        help="where `lazyproc serve` offers a tree; with -D: where a page server of CRIU's has their lazy pages",
    )
    add_older_criu(parser, "-D and --from")
    parser.add_argument(
        "--lazy", action="store_true", help="bring pages when they are touched, the rest meanwhile"
    )
    parser.add_argument(
        "--detach", action="store_true", help="return when every page is there; the tree runs on"
    )
    parser.add_argument("--pidfile", metavar="FILE", help="write the number of the root process to FILE")
    add_pidns(parser)
    add_cgroup(parser)
    add_own_policy(parser, "sequential; with --from that of the server")
    add_trace(parser)
    add_trust(parser)
    add_json(parser)
    parser.set_defaults(when_interrupted="interrupted; nothing has been restored", refuse=parser.error)


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    """Without --detach signals go to the root process, and its exit status is the command's. Once it runs nobody is
    told that nothing has been restored.
    """
    import signal

    if args.peer is None and args.directory is None:
        args.refuse("-D, --from or both are needed")
    if args.older_criu and (args.peer is None or args.directory is None):
        args.refuse("--criu-4.1 goes with -D and --from")
    from lazyproc.cli.listening import handling
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import StateChanged
    from lazyproc.show.reports import report_fields, restore_text

    def listen(event: Event) -> None:
        args.settled |= isinstance(event, StateChanged) and event.state == "running"
        listener(event)

    signals = [signal.Signals[name] for name in FORWARDED]
    with (
        _pidfile(args.pidfile, listener) as write_pid,
        _restored(args, listen) as restored,
        handling(lambda number, _: restored.forward(signal.Signals(number)), *signals),
    ):
        write_pid(restored.root_pid)
        status = _wait(restored, args.detach, listener)
        report = restored.report()
    return Outcome(restore_text(report) if args.detach else "", report_fields(report), status)


@contextmanager
def _pidfile(path: str | None, listener: Listener) -> Iterator[Callable[[int], None]]:
    """Opened before anything is built: once the tree runs it is too late to fail. Raises LazyprocError."""
    if path is None:
        yield lambda pid: None
        return
    from lazyproc.errors import LazyprocError
    from lazyproc.events import Note
    from lazyproc.private import written_later

    with ExitStack() as stack:
        try:
            write = stack.enter_context(written_later(path))
        except OSError as error:
            raise LazyprocError(
                f"cannot be written: {error.strerror}", where=path, remedy="name another file with --pidfile"
            ) from None

        def write_pid(pid: int) -> None:
            try:
                write(f"{pid}\n")
            except OSError as error:
                listener(
                    Note(f"{path}: the number of the root, {pid}, could not be written: {error.strerror}")
                )

        yield write_pid


def _restored(args: argparse.Namespace, listener: Listener) -> AbstractContextManager[Restored]:
    from pathlib import Path

    import lazyproc

    if args.peer is not None and args.directory is None:
        from lazyproc.migrate.arrival import Terms
        from lazyproc.migrate.fetch import restore_from

        if args.record is not None:
            raise lazyproc.errors.UsageError(
                "only a restore from a folder is recorded", where=args.record, remedy="use -D, or --trace"
            )

        terms = Terms(pidns=args.pidns, cgroup=args.cgroup, policy=args.policy)
        return restore_from(
            args.peer,
            terms,
            insecure=args.insecure,
            tls=tls_of(args),
            listener=listener,
            trace=args.trace,
        )
    return lazyproc.restore(
        Path(args.directory),
        lazy=args.lazy or args.peer is not None,
        pidns=args.pidns,
        policy=args.policy or "sequential",
        cgroup=args.cgroup,
        trace=args.trace,
        record=args.record,
        page_server=page_server_at(args.peer, args),
        listener=listener,
    )


def _wait(restored: Restored, detach: bool, listener: Listener) -> int:
    """Until every page is there and, unless detached, the root has ended; 0 or its status."""
    while not restored.wait_drained(POLL_S):
        counters = restored.counters()
        if counters is not None:
            listener(counters.as_event())
        ended = restored.wait_root(block=False)
        if ended is not None:
            return 0 if detach else ended
    return 0 if detach else restored.wait_root() or 0
