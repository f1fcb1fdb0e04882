"""`make bench`: runs every scene, prints medians with spread, and writes them to benchmarks/results, docs/plots and the
tables of docs/performance.md. A run of some scenes leaves docs alone: `python -m benchmarks.table` and
`python -m benchmarks.plots` take the newest run of each."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import (
    blackout,
    blackout_criu,
    guest_shapes,
    heap,
    links,
    local_fault,
    paths,
    plots,
    policies,
    qemu,
    record,
    redis,
    restore_start,
    saved_guest,
    starts,
    table,
    tls,
    toucher,
    trace_cost,
    working_set,
)
from benchmarks.measure import Result, load


@dataclass(frozen=True, slots=True)
class Scene:
    """Six rounds are the least that say with 95 % where a median lies; ten are for what stands beside other engines."""

    run: Callable[[int], Result]
    rounds: int = 10
    apart: bool = False  # only where it is named


SCENES: Mapping[str, Scene] = {
    "local-fault": Scene(local_fault.run),
    "restore-start": Scene(restore_start.run),
    "blackout": Scene(blackout.run, 6),
    "trace-cost": Scene(trace_cost.run, 6),  # of pairs it takes more than one a round
    "working-set": Scene(working_set.run),
    "policies": Scene(policies.run, 6, apart=True),  # a quarter of an hour
    "tls": Scene(tls.run, 6),
    "toucher": Scene(toucher.random, 8),
    "toucher-think": Scene(toucher.think),
    "toucher-sequential": Scene(toucher.sequential),
    "toucher-zipf": Scene(toucher.zipf),
    "remote-fault": Scene(links.remote_fault, 6),
    "bulk-rate": Scene(links.bulk_rate),
    "links": Scene(links.slow_links, 6),
    "paths": Scene(paths.run, 6),
    "blackout-criu": Scene(blackout_criu.run),
    "starts": Scene(starts.run),
    "heap": Scene(heap.run),
    "redis": Scene(redis.run),
    "qemu": Scene(qemu.run, 6),
    "saved-guest": Scene(saved_guest.run, 6),
    "guest-shapes": Scene(guest_shapes.run, 1),  # that they arrive whole counts
}
APART = ", ".join(name for name, scene in SCENES.items() if scene.apart)
LIMIT_MIN = 30  # for all of them


def _say(result: Result) -> None:
    print(f"\n{result.scene}")
    for label, samples in result.samples.items():
        print(f"  {label:44} {samples}")
    for goal in result.goals:
        print(f"  {goal}")


def _timed(name: str, rounds: int | None) -> dict[str, Any]:
    """A scene's part of the record. One that fails does not keep the others from being run."""
    scene, begun = SCENES[name], time.monotonic()
    rounds = rounds or scene.rounds
    try:
        result = scene.run(rounds)
        _say(result)
        found: dict[str, Any] = result.fields()
    except Exception as error:
        traceback.print_exc()
        words = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
        found = {"failure": "; ".join(words)}
    minutes = (time.monotonic() - begun) / 60
    print(f"  {name}: {minutes:.1f} minutes", flush=True)
    return {"name": name, "rounds": rounds, "minutes": round(minutes, 2), **found}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "scenes",
        nargs="*",
        metavar="SCENE",
        help=f"of {', '.join(SCENES)}; all but {APART} when none is named",
    )
    parser.add_argument("--rounds", type=int, help="of each scene; 10, or 6 of some, when not given")
    args = parser.parse_args()
    if unknown := set(args.scenes) - set(SCENES):
        parser.error(f"no such scene: {', '.join(sorted(unknown))}; there are {', '.join(SCENES)}")
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    # What a script starts in its background ignores SIGINT (sh), and so would receivers that are to be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    now = datetime.datetime.now(datetime.UTC)
    name = "-".join((now.strftime("%Y-%m-%dT%H%M"), *args.scenes))
    head = {
        "date": now.date().isoformat(),
        "at": now.isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load_before": load(),
    }
    found: list[dict[str, Any]] = []
    for scene in args.scenes or [name for name, scene in SCENES.items() if not scene.apart]:
        found.append(_timed(scene, args.rounds))
        # After each, so that what there is is kept when this is interrupted.
        path = record.write({**head, "load_after": load(), "results": found}, name)
    print(f"\nwritten to benchmarks/results/{path.name}")
    if not args.scenes:
        plots.draw(found)
        table.write()
        print("and to docs/plots and docs/performance.md")
    return _summary(found, whole=not args.scenes)


def _summary(found: list[dict[str, Any]], *, whole: bool) -> int:
    """Prints what it took and what failed; the exit status."""
    total = sum(scene["minutes"] for scene in found)
    print("\n" + "\n".join(f"{scene['name']:20} {scene['minutes']:5.1f} min" for scene in found))
    print(f"{'in all':20} {total:5.1f} min")
    if whole and total > LIMIT_MIN:
        print(f"that is more than the {LIMIT_MIN} minutes it should take: is the machine busy?")
    failed = [scene for scene in found if "failure" in scene]
    for scene in failed:
        print(f"FAILED: {scene['name']}: {scene['failure']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
