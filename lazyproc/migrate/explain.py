"""What would stop a checkpoint of a tree, or its move to a certain host. Nothing is stopped and nothing moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lazyproc.dump.explain import examine
from lazyproc.errors import Obstacle, UsageError
from lazyproc.events import Listener, ignore
from lazyproc.migrate.prepare import Offer, offer_of
from lazyproc.needs import Wanted
from lazyproc.pages.tls import Tls
from lazyproc.wire.jsonobject import JsonValue


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

    It only reads, within milliseconds, and the tree runs on. With `peer` (HOST:PORT) the receiver there is asked what
    it lacks for this tree; it goes on waiting. With `tcp_close` TCP connections to others are given up and do not
    stand in the way. What changes with a move and nothing can be done about goes to `listener` as Note.

    Raises NoSuchProcess, UsageError (the number of a thread), PermissionDenied, HostLacks; with `peer` also UsageError
    for the address, ConnectionLost and ProtocolError.
    """
    examined = examine(pid, tcp_close=tcp_close, listener=listener)
    if peer is None or not examined.smaps:  # nothing that lives could move
        return examined.obstacles
    offer = offer_of(examined.smaps)
    return (*examined.obstacles, *_obstacles_of(peer, offer, examined.wanted, {}, insecure, tls, listener))


def explain_guest(
    monitor: str,
    *,
    peer: str | None = None,
    insecure: bool = False,
    tls: Tls | None = None,
    tcp_close: bool = False,
    listener: Listener = ignore,
) -> tuple[Obstacle, ...]:
    """The same for the guest of the QEMU whose QMP monitor is the unix socket `monitor`; it runs on. Raises HostLacks
    when its RAM cannot be found, and what `explain` does.
    """
    from lazyproc.migrate.guest_look import obstacles
    from lazyproc.qemu.guest import look
    from lazyproc.qemu.qmp import Qmp

    if tcp_close:
        raise UsageError("a guest moves as a whole", remedy="leave out --tcp-close")
    with Qmp(monitor) as qmp:
        guest = look(qmp)
        found = tuple(obstacles(qmp, guest))
    if peer is None:
        return found
    offer, more = Offer(guest.pages, 1, 0, {}, ""), {"guest": guest.offer()}
    return (*found, *_obstacles_of(peer, offer, (), more, insecure, tls, listener))


def _obstacles_of(
    peer: str,
    offer: Offer,
    wanted: Sequence[Wanted],
    more: Mapping[str, JsonValue],
    insecure: bool,
    tls: Tls | None,
    listener: Listener,
) -> tuple[Obstacle, ...]:
    from lazyproc.migrate.asking import ONLY_ASKED, obstacles_there
    from lazyproc.migrate.link import dialled
    from lazyproc.migrate.order import Order
    from lazyproc.migrate.talk import Refused
    from lazyproc.pages.peer import Trust
    from lazyproc.wire.native import Party

    order = {**Order().fields(), **more}
    with dialled(peer, Party.SOURCE, Trust(insecure, tls=tls)) as link:
        try:
            found = obstacles_there(link.control, offer, wanted, order, listener)
        except Refused as refused:  # an older receiver gives one reason, and no way out of its own
            return (Obstacle(0, "host", f"{peer}: {refused.what}", "look at that host's log"),)
        if not found:
            link.control.send(ONLY_ASKED)
        return found
