"""A lazyproc command that waits right before its freeze: it says so in a FIFO, and goes on when another was closed.

python -m tests.live.held_up READY GO migrate PID HOST:PORT ...
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

FREEZE = "frozen_tree"
freeze: Any = getattr(source, FREEZE)


@contextmanager
def _held_up(pid: int, **options: Any) -> Iterator[FrozenTree]:
    Path(sys.argv[1]).write_text("ready\n")
    Path(sys.argv[2]).read_text()
    with freeze(pid, **options) as tree:
        yield tree


if __name__ == "__main__":
    setattr(source, FREEZE, _held_up)
    sys.exit(main(sys.argv[3:]))
