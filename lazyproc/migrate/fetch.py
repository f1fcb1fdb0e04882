"""The destination's side when it is the one who calls: `restore --from` a `serve` elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lazyproc.events import Listener
from lazyproc.migrate.destination import Terms, fetched
from lazyproc.restore.run import Restored


@contextmanager
def restore_from(target: str, terms: Terms, *, insecure: bool, listener: Listener) -> Iterator[Restored]:
    """The tree that `lazyproc serve` offers at `target` (HOST:PORT), once every page of it is here.

    Raises what `migrate` raises; the tree then runs on at its source.
    """
    started = time.monotonic()
    with fetched(target, terms, insecure=insecure, listener=listener) as arrival, arrival.arrive() as tree:
        yield Restored(tree, tree.nursery.pid, tree.root_pid, tree.checkpoint.root.vpid, started, None)
