"""The tables of docs/criu.md: `python -m tests.interop.zdtm.table` writes them anew between their markers.

The one of options is that of lazyproc/criu/options.py; those of CRIU's tests are made of the newest docs/zdtm/DATE.json
and of docs/zdtm/baseline.tsv, what CRIU 4.2 itself makes of them on the same machine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lazyproc.criu import options
from tests.interop.zdtm.runs import FAIL, MODES, PASS, SKIP, WRONG

DOCS = Path(__file__).resolve().parents[3] / "docs"
Row = Mapping[str, str]


@dataclass(frozen=True)
class Baseline:
    """What CRIU makes of a test: PASS or SKIP, by mode."""

    area: str
    results: Mapping[str, str]


def baseline() -> dict[str, Baseline]:
    found = {}
    for line in (DOCS / "zdtm/baseline.tsv").read_text().splitlines()[1:]:
        area, test, *results = line.split("\t")
        found[test] = Baseline(area, dict(zip(MODES, results, strict=True)))
    return found


def newest() -> Mapping[str, Mapping[str, Row]]:
    """Rows by mode and test."""
    file = max((DOCS / "zdtm").glob("*.json"))
    modes: Mapping[str, Mapping[str, Row]] = json.loads(file.read_text())["modes"]
    return modes


def sections() -> dict[str, str]:
    """The text of each table by the name of its marker."""
    return {
        "options": "\n".join(_options()),
        "areas": "\n".join(_areas(baseline(), newest())),
        "tests": "\n".join(_tests(baseline(), newest())),
    }


def _options() -> Iterator[str]:
    yield "| option | commands | here | |\n|---|---|---|---|"
    for names, commands, kind, words in options.rows():
        yield f"| `{names}` | {commands} | {kind} | {words} |"


def _areas(criu: Mapping[str, Baseline], ours: Mapping[str, Mapping[str, Row]]) -> Iterator[str]:
    """How many of those that CRIU passes lazyproc-criu passes."""
    yield f"| area | {' | '.join(ours)} |\n|---|{'---|' * len(ours)}"
    totals: dict[str, Counter[str]] = {}
    for area in sorted({each.area for each in criu.values()}):
        tests = [test for test, each in criu.items() if each.area == area]
        cells = []
        for mode, rows in ours.items():
            expected = [test for test in tests if criu[test].results[mode] == PASS]
            passed = sum(rows.get(test, {}).get("result") == PASS for test in expected)
            totals.setdefault(mode, Counter()).update(passed=passed, expected=len(expected))
            cells.append(f"{passed} of {len(expected)}")
        yield f"| {area} | {' | '.join(cells)} |"
    cells = [f"**{count['passed']} of {count['expected']}**" for count in totals.values()]
    yield f"| all | {' | '.join(cells)} |"


def _tests(criu: Mapping[str, Baseline], ours: Mapping[str, Mapping[str, Row]]) -> Iterator[str]:
    yield f"| test | CRIU | {' | '.join(ours)} | why not |\n|---|---|{'---|' * (len(ours) + 1)}"
    for test, each in sorted(criu.items()):
        rows = [rows.get(test, {}) for rows in ours.values()]
        theirs = "/".join(dict.fromkeys(each.results[mode] for mode in ours))
        why = next((_why(row) for row in rows if row.get("result") not in (None, PASS)), "")
        yield f"| {test.removeprefix('zdtm/')} | {theirs} | {' | '.join(map(_cell, rows))} | {why} |"


def _cell(row: Row) -> str:
    result = row.get("result", "")
    if result != FAIL:
        return result
    return f"**{row['kind']}**" if row["kind"] == WRONG else row["kind"]


def _why(row: Row) -> str:
    reason = row.get("reason", "").removeprefix("CRIU dump: ").removeprefix("CRIU restore: ")
    if row["result"] == SKIP and reason == "no flavors":
        return "not for flavour h"
    return reason.partition("\n")[0].partition("; ")[0].replace("|", "\\|")


def with_sections(text: str, tables: Mapping[str, str]) -> str:
    """`text` with what lies between `<!-- NAME -->` and `<!-- /NAME -->` replaced. Pure; ValueError without markers."""
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        start = text.index(begin) + len(begin)
        text = f"{text[:start]}{table}\n{text[text.index(end, start) :]}"
    return text


def write() -> None:
    document = DOCS / "criu.md"
    document.write_text(with_sections(document.read_text(), sections()))


if __name__ == "__main__":
    write()
