"""Run CRIU's tests and write what came of them: `python -m tests.interop.zdtm CRIU_TREE [-m MODE]... [-t REGEX]`.

The results go to docs/zdtm/DATE.json; those of tests and modes that are not run again stay as they are there.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import platform
import re
import sys
from dataclasses import asdict
from pathlib import Path

from tests.interop.zdtm.runs import MODES, Bench
from tests.interop.zdtm.table import baseline

ROOT = Path(__file__).resolve().parents[3]
COMMAND = ROOT / ".venv/bin/lazyproc-criu"


def main() -> int:
    args = _arguments()
    bench = Bench(args.tree.resolve(), args.criu.resolve())
    file = args.output or ROOT / f"docs/zdtm/{datetime.date.today().isoformat()}.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    results: dict[str, dict[str, dict[str, str]]] = known.get("modes", {})
    tests = [test for test in bench.tests() if test in baseline() and re.search(args.tests, test)]
    os.nice(19)
    for mode in args.modes or MODES:
        of_mode = results.setdefault(mode, {})
        for at, test in enumerate(tests, 1):
            result = bench.run(test, mode)
            of_mode[test] = {name: text for name, text in asdict(result).items() if text}
            print(
                f"{at}/{len(tests)} {mode} {test} {result.result} {result.kind} {result.reason}", flush=True
            )
            _write(file, results)
        print(mode, dict(collections.Counter(row["result"] for row in of_mode.values())))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.interop.zdtm", description=__doc__)
    parser.add_argument("tree", type=Path, help="a built tree of CRIU 4.2")
    parser.add_argument("-m", dest="modes", action="append", choices=MODES, help="all of them otherwise")
    parser.add_argument("-t", dest="tests", default="", metavar="REGEX", help="only the tests that match")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="another file for the results")
    parser.add_argument("--criu", type=Path, default=COMMAND, help="another command to test")
    return parser.parse_args()


def _write(file: Path, modes: dict[str, dict[str, dict[str, str]]]) -> None:
    """Whole or not at all: it may be interrupted at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {"criu": "4.2", "flavour": "h", "kernel": platform.release()}
    ordered = {mode: dict(sorted(rows.items())) for mode, rows in modes.items()}
    new = file.with_suffix(".new")
    new.write_text(json.dumps({**about, "modes": ordered}, indent=0, ensure_ascii=False) + "\n")
    new.replace(file)


if __name__ == "__main__":
    sys.exit(main())
