"""lazyproc explain: what would stop a checkpoint or a move, without stopping anything."""

from __future__ import annotations

import argparse

from lazyproc.cli.options import Commands, add_json, add_pid, command

OBSTACLES = 3


def add(commands: Commands) -> None:
    parser = command(commands, run, "explain", "say what would stop a checkpoint or a move of a process tree")
    add_pid(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import lazyproc
    from lazyproc.cli.listening import listening
    from lazyproc.events import Event, Stats
    from lazyproc.show.failures import obstacle_fields, obstacles_text
    from lazyproc.show.text import print_json

    stats = Stats()
    with listening(args) as listener:

        def listen(event: Event) -> None:
            stats(event)
            listener(event)

        obstacles = lazyproc.explain(args.pid, listener=listen)
    if args.json:
        fields = [obstacle_fields(obstacle) for obstacle in obstacles]
        print_json({"pid": args.pid, "obstacles": fields, "notes": stats.notes})
    elif obstacles:
        print(obstacles_text(obstacles))
    else:
        print(f"nothing stops a checkpoint or a move of pid {args.pid}")
    return OBSTACLES if obstacles else 0
