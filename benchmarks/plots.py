"""docs/plots/*.svg from the raw samples of a run: `python -m benchmarks.plots` draws them from the newest each."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import Scene, newest
from benchmarks.svg import Axis, Line, chart, linear, logarithmic, nines
from tests.live.programs import stall_floor_ns

PLOTS = Path(__file__).parents[1] / "docs" / "plots"
SCENES = ("toucher", "toucher-zipf", "links", "heap", "redis")
POINTS = 250  # of a line; more of them nobody sees
SHOWN_MS = 12_000
Grouped = Mapping[str, Any]  # by engine, in the order of the record


def draw(scenes: Iterable[Scene]) -> list[Path]:
    """What there is to draw of them, each as SCENE-WHAT.svg."""
    PLOTS.mkdir(exist_ok=True)
    written = []
    for scene in scenes:
        if scene["name"] in SCENES and "failure" not in scene:
            for what, text in _charts(scene):
                path = PLOTS / f"{scene['name']}-{what.replace(' ', '-')}.svg"
                path.write_text(text)
                written.append(path)
    return written


def _charts(scene: Scene) -> Iterable[tuple[str, str]]:
    for what, by_engine in _by_engine(scene["tracks"]).items():
        yield what, _over_time(f"{scene['scene']}: {what}", what, by_engine)
    for what, by_engine in _by_engine(scene["spectra"]).items():
        yield f"{what} spread", _spread(f"{scene['scene']}: {what}", by_engine)


def _by_engine(named: Mapping[str, Any]) -> Mapping[str, Grouped]:
    """Of WHAT, ENGINE: by what, then by engine."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in named.items():
        what, _, engine = name.partition(", ")
        found[what][engine] = value
    return found


def _over_time(title: str, what: str, by_engine: Grouped) -> str:
    """The median of the rounds, and their range around it."""
    longest = max(len(track["values"]) for tracks in by_engine.values() for track in tracks)
    joined = -(-longest // POINTS)
    unit, scale, combine = _UNITS[next(iter(by_engine.values()))[0]["unit"]]
    lines = [_line(engine, tracks, joined, scale, combine) for engine, tracks in by_engine.items()]
    lasts = [line.points[-1][0] for line in lines]
    first = min(line.points[0][0] for line in lines)
    y = _UP[what](unit, [value for line in lines for _, *each in line.band for value in each])
    return chart(title, linear("seconds since the freeze", first, max(lasts)), y, lines)


def _line(
    engine: str,
    tracks: Sequence[Mapping[str, Any]],
    joined: int,
    scale: float,
    combine: Callable[[Sequence[float]], float],
) -> Line:
    """`joined` steps of a track become one point."""
    by_step: dict[int, list[float]] = defaultdict(list)
    step_ms = tracks[0]["step_ms"] * joined
    for track in tracks:
        groups: dict[int, list[float]] = defaultdict(list)
        for number, value in enumerate(track["values"]):
            groups[round((track["begin_ms"] + number * track["step_ms"]) // step_ms)].append(value)
        for step, values in groups.items():
            by_step[step].append(combine(values) * scale)
    band = [
        (step * step_ms / 1e3, min(values), max(values))
        for step, values in sorted(by_step.items())
        if 2 * len(values) > len(tracks)
        and step * step_ms <= SHOWN_MS  # where most of the rounds still went on
    ]
    points = [(at, statistics.median(by_step[round(at * 1e3 / step_ms)])) for at, _, _ in band]
    return Line(engine, points, band)


def _upwards(unit: str, values: Sequence[float]) -> Axis:
    return linear(unit, 0, max(values) * 1.05)


def _decades(unit: str, values: Sequence[float]) -> Axis:
    positive = [value for value in values if value > 0]
    return logarithmic(unit, min(positive), max(positive))


_UNITS: Mapping[str, tuple[str, float, Callable[[Sequence[float]], float]]] = {
    "visits in 10 ms": ("visits a second", 100.0, statistics.fmean),
    "MiB": ("MiB that are there", 1.0, max),
    "us": ("ms", 1e-3, max),
}
_UP: Mapping[str, Callable[[str, Sequence[float]], Axis]] = {
    "throughput": _upwards,
    "resident": _upwards,
    "worst latency": _decades,
}


def _spread(title: str, by_engine: Grouped) -> str:
    """How many took no longer, all rounds together."""
    lines = [Line(engine, _cumulated(rounds)) for engine, rounds in by_engine.items()]
    durations = [at for line in lines for at, _ in line.points]
    x = logarithmic("microseconds", min(durations), max(durations))
    return chart(title, x, nines("share that took no longer"), lines)


def _cumulated(rounds: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    counts = [sum(each) for each in zip(*rounds, strict=True)]
    total, seen, points = sum(counts), 0, []
    for bucket, count in enumerate(counts):
        if count:
            points.append((stall_floor_ns(bucket) / 1e3, seen / total))
            seen += count
            points.append((stall_floor_ns(bucket + 1) / 1e3, seen / total))
    return points or [(1.0, 0.0)]


if __name__ == "__main__":
    for drawn in draw(scene for _, _, scene in newest().values()):
        print(f"written to docs/plots/{drawn.name}")
