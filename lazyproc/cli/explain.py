"""lazyproc explain: what would stop a checkpoint or a move, without stopping anything."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import (
    Commands,
    add_json,
    add_peer,
    add_pid_or_qemu,
    add_tcp_close,
    command,
    of_pid_or_qemu,
    tls_of,
)

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Listener

OBSTACLES = 3


def add(commands: Commands) -> None:
    parser = command(
        commands,
        run,
        "explain",
        "say what would stop a checkpoint or a move of a process tree",
        only_tells=True,
    )
    add_pid_or_qemu(parser)
    add_peer(parser, "what would stop a move to the receiver there; it is asked, and nothing moves")
    add_tcp_close(parser)
    add_json(parser)


def run(args: argparse.Namespace, listener: Listener) -> Outcome:
    import lazyproc
    from lazyproc.cli.outcome import Outcome
    from lazyproc.events import Event, Stats
    from lazyproc.show.failures import obstacle_fields, obstacles_text

    stats = Stats()

    def listen(event: Event) -> None:
        stats(event)
        listener(event)

    explain = of_pid_or_qemu(args, lazyproc.explain, lazyproc.explain_guest)
    obstacles = explain(
        peer=args.peer,
        insecure=args.insecure,
        tls=tls_of(args),
        tcp_close=args.tcp_close,
        listener=listen,
    )
    of = {"pid": args.pid} if args.qemu is None else {"qemu": args.qemu}
    fields = [obstacle_fields(obstacle) for obstacle in obstacles]
    return Outcome(
        obstacles_text(obstacles) or _nothing(args),
        {**of, "peer": args.peer, "obstacles": fields, "notes": stats.notes},
        OBSTACLES if obstacles else 0,
    )


def _nothing(args: argparse.Namespace) -> str:
    what = f"pid {args.pid}" if args.qemu is None else f"the guest behind {args.qemu}"
    if args.peer:
        return f"nothing stops a move of {what} to {args.peer}"
    return f"nothing stops a checkpoint or a move of {what}"
