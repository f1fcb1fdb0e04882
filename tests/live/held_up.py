"""A lazyproc command that waits at a point of its move: it says so in a FIFO, and goes on when another was closed.

    python -m tests.live.held_up READY GO (freeze|built) migrate PID HOST:PORT ...

At `freeze` nothing is stopped yet; at `built` all of the tree stands, at both sides, and COMMIT is what comes next.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lazyproc.cli.main import main
from lazyproc.dump.freeze import FrozenTree
from lazyproc.migrate import source

FREEZE, BUILT = ("frozen_tree", "_await_built")
freeze: Any = getattr(source, FREEZE)
await_built: Any = getattr(source, BUILT)


def _wait() -> None:
    Path(sys.argv[1]).write_text("ready\n")
    Path(sys.argv[2]).read_text()


@contextmanager
def _before_freeze(pid: int, **options: Any) -> Iterator[FrozenTree]:
    _wait()
    with freeze(pid, **options) as tree:
        yield tree


def _after_built(*args: Any) -> Any:
    built = await_built(*args)
    _wait()
    return built


def held_up(ready: Path, go: Path, point: str) -> list[str]:
    """What a command is run by, so that it waits there."""
    return [sys.executable, "-m", "tests.live.held_up", str(ready), str(go), point]


if __name__ == "__main__":
    if sys.argv[3] == "freeze":
        setattr(source, FREEZE, _before_freeze)
    else:
        setattr(source, BUILT, _after_built)
    sys.exit(main(sys.argv[4:]))
