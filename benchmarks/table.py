"""`python -m benchmarks.table`: writes the tables of docs/performance.md from the newest run of each scene, so that no
figure is copied by hand. A scene that has not been run, or failed, is said to be missing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.measure import brief
from benchmarks.record import Run, Scene, newest

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
Newest = Mapping[str, tuple[str, Run, Scene]]


@dataclass(frozen=True, slots=True)
class Row:
    """A goal of a scene; or samples of it, for what has no limit."""

    words: str
    scene: str
    goal: str = ""
    samples: Sequence[str] = ()


GUEST_WAYS = ("no limit", "1gbit", "100mbit")
OF_A_GUEST = {
    "longest gap, {}: lazyproc / QEMU's best": "a guest, {}: longest gap, of QEMU's best post-copy",
    "visits, {}: QEMU's best / lazyproc": "its work during the copy, QEMU's best / lazyproc",
    "total, {}: lazyproc / QEMU's best": "total time, of QEMU's best",
    "stop to run, {}, ms": "stop to run, ms",
}
GOALS = (
    Row(
        "random toucher, 512 MiB: time until all resident, of CRIU's",
        "toucher",
        "resident_ms, lazyproc / CRIU lazy",
    ),
    Row("sum of its stalls, of CRIU's", "toucher", "stall_sum_ms, lazyproc / CRIU lazy"),
    Row("p99 of its stalls, of CRIU's", "toucher", "stall_p99_ms, lazyproc / CRIU lazy"),
    Row("fault p99 with bulk / idle, 1 Gbit", "remote-fault", "p99 at 1 Gbit, with bulk / idle"),
    Row("remote fault p50 / C", "remote-fault", "p50, lazyproc / C"),
    Row("bulk rate, C / lazyproc", "bulk-rate", "bulk rate, C / lazyproc"),
    Row("bulk rate, plain / TLS", "tls", "bulk rate, plain / TLS"),
    Row("fault with TLS, p50 and p99", "tls", samples=("quiet: p50, TLS", "quiet: p99, TLS")),
    Row(
        "1 Gbit, work in seconds 1-5, before / after, hot set 64 MiB",
        "links",
        "slowdown, 1gbit: before / seconds 1-5",
    ),
    Row("longest gap there, ms", "links", "longest gap, 1gbit, ms"),
    Row("total time / (bytes / link), 1 Gbit", "links", "time, 1gbit: total / (bytes / link)"),
    Row("total time / (bytes / link), 100 Mbit", "links", "time, 100mbit: total / (bytes / link)"),
    Row("bytes on the wire / (pages x 4096), 1 Gbit", "links", "wire, 1gbit: bytes / (pages x 4096)"),
    Row("bytes on the wire / (pages x 4096), 100 Mbit", "links", "wire, 100mbit: bytes / (pages x 4096)"),
    Row(
        "blackout, 5 threads and 1 GiB, of CRIU's", "blackout-criu", "5 threads, 1 GiB: lazyproc / CRIU lazy"
    ),
    Row(
        "redis with 1 GiB, freeze to first answer, of CRIU's",
        "redis",
        "freeze to first answer, lazyproc / CRIU lazy",
    ),
    Row(
        "what 64 threads add to the blackout / 85 us each",
        "blackout-criu",
        "64 threads: what they add / the prototype's",
    ),
    Row("what 1,000 VMAs add / 2 us each", "blackout-criu", "1000 VMAs: what they add / the prototype's"),
    Row("`--trace` on / off", "trace-cost", "traced / not traced, median of the pairs"),
    Row(
        "faults of a second restore with a recorded working set / of the first",
        "working-set",
        "faults of the second / of the first",
    ),
    *(
        Row(words.format(way), "qemu", goal.format(way))
        for way in GUEST_WAYS
        for goal, words in OF_A_GUEST.items()
    ),
    Row("longest gap there, ms", "qemu", "longest gap, 100mbit, ms"),
    Row("a saved guest of 1 GiB: its first beat, ms", "saved-guest", "first beat, 1 GiB, ms"),
    Row("eight guests from a saved one: median first beat, ms", "saved-guest", "median first beat of 8, ms"),
    Row("the last first beat of them, ms", "saved-guest", "last first beat of 8, ms"),
)
# Scenes all of whose medians are shown; those of the others are in the JSON.
SHOWN = ("starts", "redis", "heap", "saved-guest", "guest-shapes")
OF_A_LINK = ("total", "blackout", "fault p50", "fault p99", "stream")
OF_A_POLICY = ("stalls", "stall_sum_ms")


def _limit(value: float) -> str:
    whole = round(1 / value) if value < 1 else 0
    return f"1/{whole}" if whole and math.isclose(value, 1 / whole) else brief(value)


def _goal(row: Row, scene: Scene) -> str:
    goal: Mapping[str, Any] = next(each for each in scene["goals"] if each["name"] == row.goal)
    words = [goal["words"]] if goal["words"] else []
    if goal["interval"]:
        low, high = goal["interval"]
        words.append(f"median in {brief(low)} to {brief(high)}")
    verdict = "met" if goal["met"] else "**missed**"
    return (
        f"| {row.words} | {_limit(goal['limit'])} | {brief(goal['ratio'])} ({'; '.join(words)}) | {verdict} |"
    )


def _samples(row: Row, scene: Scene) -> str:
    found = [scene["samples"][name] for name in row.samples]
    words = [f"{brief(each['median'])} {each['unit']}" for each in found]
    return f"| {row.words} | | {', '.join(words)} | |"


def goal_table(found: Newest) -> Iterator[str]:
    yield "| goal | limit | measured | |"
    yield "|---|---|---|---|"
    for row in GOALS:
        if row.scene not in found:
            yield f"| {row.words} | | not measured (scene `{row.scene}`) | |"
        else:
            scene = found[row.scene][2]
            yield _goal(row, scene) if row.goal else _samples(row, scene)


def run_table(found: Newest) -> Iterator[str]:
    """Which run each scene is of."""
    yield "| run | scenes, rounds, minutes | kernel, processors | load before, after |"
    yield "|---|---|---|---|"
    by_file: dict[str, list[str]] = {}
    for name, (file, _, scene) in found.items():
        by_file.setdefault(file, []).append(f"`{name}` {scene['rounds']} ({scene['minutes']:.1f} min)")
    runs = {file: run for file, run, _ in found.values()}
    for file, names in sorted(by_file.items()):
        run = runs[file]
        before, after = run["load_before"][0], run["load_after"][0]
        machine = f"Linux {run['kernel']}, {run['cpus']}"
        yield f"| {file} | {', '.join(names)} | {machine} | {before:.1f}, {after:.1f} |"


def link_table(found: Newest) -> Iterator[str]:
    """The scene `paths`: a row for each way and who went it, bbr and cubic side by side."""
    samples: Mapping[str, Any] = found["paths"][2]["samples"] if "paths" in found else {}
    units = {name.split(", ")[0]: each["unit"] for name, each in samples.items()}
    shown = [what for what in OF_A_LINK if what in units]
    yield "| link | who | " + " | ".join(f"{what}, {units[what]}" for what in shown) + " |"
    yield "|---|---|" + "---|" * len(shown)
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, each in samples.items():
        what, way, control, who = name.split(", ")
        row = rows.setdefault((way, who), {})
        row.setdefault(what, []).append(f"{control} {brief(each['median'])}")
    for (way, who), row in rows.items():
        yield f"| {way} | {who} | " + " | ".join("; ".join(row.get(what, [])) for what in shown) + " |"


def policy_table(found: Newest) -> Iterator[str]:
    """The scene `policies`: a row for each, a column for each cargo."""
    samples: Mapping[str, Any] = found["policies"][2]["samples"] if "policies" in found else {}
    names = [name.split(", ") for name in samples]
    cargoes, policies = (list(dict.fromkeys(name[which] for name in names)) for which in (1, 2))
    yield "| | " + " | ".join(cargoes) + " |"
    yield "|---|" + "---|" * len(cargoes)
    for policy in policies:
        cells = (
            ", ".join(brief(samples[f"{what}, {cargo}, {policy}"]["median"]) for what in OF_A_POLICY)
            for cargo in cargoes
        )
        yield f"| `{policy}` | " + " | ".join(cells) + " |"


def guest_table(found: Newest) -> Iterator[str]:
    """The scene `qemu`: a row for each link and who moved the guest over it; one has less to say."""
    samples: Mapping[str, Any] = found["qemu"][2]["samples"] if "qemu" in found else {}
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for name, each in samples.items():
        what, *row = name.split(", ")
        rows.setdefault(tuple(row), {})[f"{what}, {each['unit']}"] = brief(each["median"])
    columns = list(dict.fromkeys(chain(*sorted(rows.values(), key=len, reverse=True))))
    yield "| link | who | " + " | ".join(columns) + " |"
    yield "|---|---|" + "---|" * len(columns)
    for (way, who), cells in rows.items():
        yield f"| {way} | {who} | " + " | ".join(cells.get(column, "") for column in columns) + " |"


def median_table(found: Newest) -> Iterator[str]:
    yield "| scene | what | median | median lies in |"
    yield "|---|---|---|---|"
    for name in SHOWN:
        for what, each in found[name][2]["samples"].items() if name in found else ():
            low, high = each["interval"]
            yield f"| `{name}` | {what} | {brief(each['median'])} {each['unit']} | {brief(low)} to {brief(high)} |"


def replaced(text: str, name: str, lines: Iterator[str]) -> str:
    """What stands between the marks of a table, exchanged. ValueError: there are none."""
    begin, end = f"<!-- {name}: python -m benchmarks.table -->\n", f"<!-- end of {name} -->\n"
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return head + begin + "\n".join(lines) + "\n" + end + tail


TABLES = {
    "runs": run_table,
    "goals": goal_table,
    "links": link_table,
    "medians": median_table,
    "policies": policy_table,
    "guests": guest_table,
}


def write() -> None:
    found, text = newest(), DOCUMENT.read_text()
    for name, table in TABLES.items():
        text = replaced(text, name, table(found))
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    write()
