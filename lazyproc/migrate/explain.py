"""What would stop a checkpoint of a tree, or its move to a certain host. Nothing is stopped and nothing moves."""

from __future__ import annotations

from lazyproc.dump.explain import Examined, examine
from lazyproc.errors import Obstacle
from lazyproc.events import Listener, ignore
from lazyproc.pages.tls import Tls


def explain(
    pid: int,
    *,
    peer: str | None = None,
    insecure: bool = False,
    tls: Tls | None = None,
    tcp_close: bool = False,
    listener: Listener = ignore,
) -> tuple[Obstacle, ...]:
    """Everything that would stop a checkpoint or a move of the tree under `pid`; empty when nothing would.

    With `peer` (HOST:PORT) the receiver there is asked what it lacks for this tree; it goes on waiting. See
    lazyproc.dump.explain.explain for what is raised; with `peer` also UsageError for the address, ConnectionLost,
    PermissionDenied and ProtocolError.
    """
    examined = examine(pid, tcp_close=tcp_close, listener=listener)
    if peer is None or not examined.smaps:  # nothing that lives could move
        return examined.obstacles
    return (*examined.obstacles, *_obstacles_of(peer, examined, insecure, tls, listener))


def _obstacles_of(
    peer: str, examined: Examined, insecure: bool, tls: Tls | None, listener: Listener
) -> tuple[Obstacle, ...]:
    from lazyproc.migrate.asking import ONLY_ASKED, obstacles_there
    from lazyproc.migrate.link import dialled
    from lazyproc.migrate.prepare import offer_of
    from lazyproc.migrate.source import Order
    from lazyproc.migrate.talk import Refused
    from lazyproc.pages.peer import Trust
    from lazyproc.wire.native import Party

    offer = offer_of(examined.smaps)
    with dialled(peer, Party.SOURCE, Trust(insecure, tls=tls)) as link:
        try:
            found = obstacles_there(link.control, offer, examined.wanted, Order().fields(), listener)
        except Refused as refused:  # an older receiver gives one reason, and no way out of its own
            return (Obstacle(0, "host", f"{peer}: {refused.what}", "look at that host's log"),)
        if not found:
            link.control.send(ONLY_ASKED)
        return found
