"""`make bench`: runs every scene, prints medians with spread, and writes them to benchmarks/results and docs/plots."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import (
    blackout,
    blackout_criu,
    heap,
    links,
    local_fault,
    paths,
    plots,
    record,
    redis,
    restore_start,
    starts,
    tls,
    toucher,
    trace_cost,
    working_set,
)
from benchmarks.measure import Result, load

SCENES: Mapping[str, Callable[[int], Result]] = {
    "local-fault": local_fault.run,
    "restore-start": restore_start.run,
    "blackout": blackout.run,
    "trace-cost": trace_cost.run,
    "working-set": working_set.run,
    "tls": tls.run,
    "toucher": toucher.random,
    "toucher-think": toucher.think,
    "toucher-sequential": toucher.sequential,
    "toucher-zipf": toucher.zipf,
    "remote-fault": links.remote_fault,
    "bulk-rate": links.bulk_rate,
    "links": links.slow_links,
    "paths": paths.run,
    "blackout-criu": blackout_criu.run,
    "starts": starts.run,
    "heap": heap.run,
    "redis": redis.run,
}
LIMIT_MIN = 30  # for all of them


def _say(result: Result) -> None:
    print(f"\n{result.scene}")
    for label, samples in result.samples.items():
        print(f"  {label:44} {samples}")
    for goal in result.goals:
        print(f"  {goal}")


def _timed(name: str, rounds: int) -> dict[str, Any]:
    """A scene's part of the record. One that fails does not keep the others from being run."""
    begun = time.monotonic()
    try:
        result = SCENES[name](rounds)
        _say(result)
        found: dict[str, Any] = result.fields()
    except Exception as error:
        traceback.print_exc()
        found = {"failure": f"{type(error).__name__}: {error}"}
    minutes = (time.monotonic() - begun) / 60
    print(f"  {name}: {minutes:.1f} minutes", flush=True)
    return {"name": name, "minutes": round(minutes, 2), **found}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "scenes", nargs="*", metavar="SCENE", help=f"of {', '.join(SCENES)}; all when none is named"
    )
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    if unknown := set(args.scenes) - set(SCENES):
        parser.error(f"no such scene: {', '.join(sorted(unknown))}; there are {', '.join(SCENES)}")
    now, before = datetime.datetime.now(datetime.UTC), load()
    found = [_timed(name, args.rounds) for name in args.scenes or SCENES]
    run = {
        "date": now.date().isoformat(),
        "at": now.isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks", *args.scenes, "--rounds", str(args.rounds)]),
        "rounds": args.rounds,
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load_before": before,
        "load_after": load(),
        "results": found,
    }
    path = record.write(run, "-".join((now.strftime("%Y-%m-%dT%H%M"), *args.scenes)))
    print(f"\nwritten to benchmarks/results/{path.name}")
    for plot in plots.draw(found):
        print(f"written to docs/plots/{plot.name}")
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
