"""Lets a reaction (reactive.py) see the faults of a pager, and the pager have what it names: a thread of its own.

The fault thread leaves addresses in a ring and waits for nobody; what comes next is decided a moment later (ADR 17).
"""

from __future__ import annotations

import threading
import time
from itertools import islice

from lazyproc.uffd.pager import Pager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lazyproc.uffd.reactive import Reaction

PERIOD_S = 0.001  # between two looks at least,
SHARE = 0.1  # and as much of a processor at most
LOOK_S = 1.0
MOST = 256  # runs


def follow(pager: Pager, reaction: Reaction) -> None:
    """Until the pager is done or stopped; that ends the thread as well."""
    threading.Thread(target=_follow, args=(pager, reaction), name="planner", daemon=True).start()


def _follow(pager: Pager, reaction: Reaction) -> None:
    while (faults := pager.faulted(LOOK_S)) is not None:
        if faults and not pager.bulk:
            return
        if faults:
            begun = time.thread_time()
            reaction = reaction.after(faults)
            pager.bring_ahead(islice(reaction.ahead(), MOST))
            time.sleep(max(PERIOD_S, (time.thread_time() - begun) / SHARE))
