"""One JSON file a run: what every scene found, with all raw samples."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_NUMBERS = re.compile(r"\[[\s\d.,eE+-]+\]")
Scene = Mapping[str, Any]  # the fields of a Result, with `name` and `minutes`, or `failure`
Run = Mapping[str, Any]


def write(run: Run, name: str) -> Path:
    """Lists of numbers stand in one line."""
    path = RESULTS / f"{name}.json"
    text = json.dumps(run, indent=1)
    path.write_text(_NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n")
    return path


def runs() -> Iterator[tuple[str, Run]]:
    """File name and content of all runs, the newest first."""
    found = [(path.name, json.loads(path.read_text())) for path in RESULTS.glob("*.json")]
    yield from sorted(found, key=lambda each: (each[1].get("at", each[1]["date"]), each[0]), reverse=True)


def newest() -> dict[str, tuple[str, Run, Scene]]:
    """By scene: the newest run in which it did not fail, and what it found there."""
    found: dict[str, tuple[str, Run, Scene]] = {}
    for file, run in runs():
        for scene in run["results"]:
            if "name" in scene and "failure" not in scene:
                found.setdefault(scene["name"], (file, run, scene))
    return found
