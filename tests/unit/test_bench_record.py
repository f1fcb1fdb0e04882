"""What is made of the raw samples of `make bench`: goals, tables, plots, and what a client of an open loop saw."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from benchmarks.answers import Answers
from benchmarks.measure import Goal, Samples
from benchmarks.svg import Axis, Line, chart, linear, logarithmic, nines
from benchmarks.table import DOCUMENT, TABLES, guest_table, policy_table, replaced

MS = 1_000_000


def test_a_goal_is_the_ratio_of_medians_and_the_range_of_the_rounds() -> None:
    goal = Goal.of("mine / theirs", 0.5, Samples("ms", (1, 2, 9)), Samples("ms", (4, 4, 2)))
    assert goal.ratio == 0.5
    assert goal.met
    assert goal.words == "2 / 4 ms"
    assert goal.interval == (0.25, 4.5)


def test_a_table_takes_the_place_of_the_old_one() -> None:
    begin, end = "<!-- goals: python -m benchmarks.table -->\n", "<!-- end of goals -->\n"
    text = f"before\n{begin}| old |\n{end}after\n"
    assert replaced(text, "goals", iter(["| new |"])) == f"before\n{begin}| new |\n{end}after\n"
    with pytest.raises(ValueError, match="unpack"):
        replaced("no marks", "goals", iter([]))


@pytest.mark.parametrize("name", TABLES)
def test_each_table_has_its_place(name: str) -> None:
    assert replaced(DOCUMENT.read_text(), name, iter(["| new |"])).count("| new |") == 1


def test_the_policies_stand_below_each_other() -> None:
    names = [
        f"{what}, {name}"
        for what in ("stall_sum_ms", "stalls")
        for name in ("scan, one", "scan, other", "zipf, one")
    ]
    samples = {name: {"median": float(number)} for number, name in enumerate([*names, "stalls, zipf, other"])}
    samples["stall_sum_ms, zipf, other"] = {"median": 0.25}
    table = policy_table({"policies": ("a.json", {}, {"samples": samples})})
    assert list(table)[2:] == ["| `one` | 3, 0 | 5, 2 |", "| `other` | 4, 1 | 6, 0.25 |"]


def test_who_has_less_to_say_of_a_guest_has_empty_cells() -> None:
    names = ["first beat, nowhere, QEMU", "gap, no limit, lazyproc", "copy, no limit, lazyproc"]
    samples = {name: {"median": float(number), "unit": "ms"} for number, name in enumerate(names)}
    table = guest_table({"qemu": ("a.json", {}, {"samples": samples})})
    assert list(table) == [
        "| link | who | gap, ms | copy, ms | first beat, ms |",
        "|---|---|---|---|---|",
        "| nowhere | QEMU |  |  | 0 |",
        "| no limit | lazyproc | 1 | 2 |  |",
    ]


def test_who_waits_behind_another_has_waited_from_the_moment_he_was_due() -> None:
    # One request every millisecond, nobody is answered from 5 to 25 ms, then all at once.
    due = tuple(n * MS for n in range(30))
    came = tuple(max(at, 25 * MS) if at > 5 * MS else at for at in due)
    answers = Answers(due, came, begun=2 * MS, frozen=7 * MS)
    assert answers.silence() == (5 * MS, 25 * MS)
    assert answers.longest_ms() == 20
    assert answers.latencies(6 * MS, 26 * MS) == [n * MS for n in range(20)]


@pytest.mark.parametrize(
    ("axis", "places"),
    [
        (linear("", 0, 10), {0: 0, 5: 0.5, 10: 1, 11: 1, -1: 0}),
        (logarithmic("", 2, 900), {1: 0, 1000: 1, 10: 1 / 3}),
        (nines("", 0.99), {0: 0, 0.9: 0.5, 0.99: 1, 1: 1}),
    ],
)
def test_where_a_value_lies_on_an_axis(axis: Axis, places: dict[float, float]) -> None:
    found = {value: axis.part(value) for value in places}
    assert found == pytest.approx(places)


def test_a_chart_is_xml_and_names_its_lines() -> None:
    line = Line("a < b", [(0, 1), (1, 2)], [(0, 0.5, 1.5), (1, 1, 3)])
    root = ElementTree.fromstring(chart("title", linear("s", 0, 1), linear("MiB", 0, 3), [line]))
    assert "a < b" in [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
