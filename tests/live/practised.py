"""What is compiled and imported while a process is frozen and described, after a freeze was practised; one a line.

python -m tests.live.practised PID
"""

from __future__ import annotations

import os
import sys
from typing import Any

from lazyproc import facts
from lazyproc.dump.before import observed_sleeps
from lazyproc.dump.freeze import frozen_tree
from lazyproc.dump.gather import dumped
from lazyproc.dump.park import parking
from lazyproc.dump.source import dump_pages
from lazyproc.migrate.description import Reader, description
from lazyproc.migrate.holding import holding_of, to_facts
from lazyproc.migrate.practice import practise
from lazyproc.migrate.source import look
from lazyproc.steps import Steps
from lazyproc.wire.native import REVISION

COMPILE = "_compiled_init"


def main(pid: int) -> None:
    before = look(pid)
    practise(connected=True)
    try:
        raise SystemExit(f"left behind: {os.waitpid(-1, os.WNOHANG)}")
    except ChildProcessError:
        pass
    asleep, steps, compiled = observed_sleeps(pid), Steps(), []
    real: Any = getattr(facts, COMPILE)

    def noted(cls: type, frozen: bool) -> Any:
        compiled.append(cls.__qualname__)
        return real(cls, frozen)

    setattr(facts, COMPILE, noted)
    known = set(sys.modules)
    with (
        frozen_tree(pid, asleep=asleep, steps=steps) as tree,
        dumped(tree, seen=before.seen, steps=steps) as dump,
        dump_pages(dump) as pages,
    ):
        description(dump.checkpoint, pages, steps, Reader(REVISION, before.written))
        to_facts(holding_of(dump, parking(tree)))
    print(*compiled, *(set(sys.modules) - known), sep="\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
