"""`receive`: trees that other hosts migrate are taken in, each by a keeper of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

from lazyproc.errors import CannotListen, ConnectionLost, Parked, ProtocolError, UsageError
from lazyproc.events import Listener, Note, StateChanged, ignore
from lazyproc.kernel.ready import readable
from lazyproc.migrate.answering import demand_own
from lazyproc.migrate.apart import Messages
from lazyproc.migrate.arrival import USUAL, Terms
from lazyproc.migrate.desk import ask
from lazyproc.migrate.doorstep import LET_LISTEN
from lazyproc.migrate.journal import DESTINATION, forget_old, records
from lazyproc.migrate.keeping import keep
from lazyproc.migrate.link import Gathering
from lazyproc.migrate.paging import Preferences
from lazyproc.migrate.place import Place
from lazyproc.migrate.reception import hand_on
from lazyproc.pages.address import parse_address
from lazyproc.pages.channel import Channel
from lazyproc.pages.door import Door, listen
from lazyproc.pages.peer import Trust
from lazyproc.pages.tls import Tls
from lazyproc.qemu.command import demand_command
from lazyproc.trace import TraceFile
from lazyproc.wire.native import Party, Role

DOOR_S = 0.2
MAX_ARRIVING = 32  # trees that are not here yet: each is three processes, and begun with three connections


def receive(
    address: str,
    terms: Terms = USUAL,
    *,
    once: bool = False,
    insecure: bool = False,
    tls: Tls | None = None,
    listener: Listener = ignore,
    opened: Callable[[int], object] = lambda port: None,
    over: Callable[[], bool] = lambda: False,
) -> int:
    """Take in trees at HOST:PORT until interrupted, or until one has come whole (`once`); how many committed.

    Each has a keeper that goes on without us. Only root and our own user on this host are let in, unless `tls` or
    `insecure` say otherwise. `opened` learns the port; `over` is asked now and then whether that is
    all. Raises UsageError (the address, the policy, a record of more than one tree), ImageError (what was recorded),
    CannotListen, HostLacks (our own limits are too low); with `once` Parked when all who worked on the tree are gone.
    """
    if terms.record is not None and not once:
        raise UsageError("a record is of one tree", where=terms.record, remedy="add --once")
    if terms.command and terms.uids:
        raise UsageError("a guest runs as QEMU does", remedy="leave out --allow-uid, and give QEMU -runas")
    if terms.command:
        demand_command(terms.command)
    demand_own()
    forget_old()
    trust = Trust(insecure, terms.uids, tls)
    with (
        _preferences(terms, listener) as preferences,
        _door(address, trust, listener) as door,
        closing(_Arrivals(door, terms, preferences, trust, listener)) as arrivals,
    ):
        listener(Note(f"listening on port {door.port}"))
        opened(door.port)
        while not (once and (arrivals.whole or arrivals.left)) and not over():
            arrivals.attend(DOOR_S)
        if once and arrivals.left and not arrivals.whole:
            raise Parked(
                "the tree that came is not whole, and nobody works on it any more",
                where=address,
                remedy="see lazyproc sessions, and lazyproc resume there, unless it was ended with lazyproc abort",
            )
        return arrivals.committed


def _door(address: str, trust: Trust, listener: Listener) -> Door:
    """Keepers of trees that came before may listen there, in place of a receiver that has ended. Raises as `listen`."""
    try:
        return listen(address, Party.DESTINATION, trust=trust, report=listener)
    except CannotListen:
        port = str(parse_address(address)[1])
        places = [(each.session, str(each.facts.get("address", ""))) for each in records()]
        keepers = [session for session, place in places if place.rpartition(":")[2] == port]
        if {} not in [ask(session, DESTINATION, LET_LISTEN) for session in keepers]:
            raise
    return listen(address, Party.DESTINATION, trust=trust, report=listener)


@contextmanager
def _preferences(terms: Terms, listener: Listener) -> Iterator[Preferences]:
    """Read before anything comes in: what is known then is known in every keeper."""
    if terms.policy is None:
        policy = None
    else:
        from lazyproc.restore.workingset import policy_of

        policy = policy_of(terms.policy)
    with TraceFile(terms.record, listener) if terms.record is not None else nullcontext() as record:
        yield Preferences(policy, record)


class _Arrivals:
    """Those on their way in, and what their keepers tell. `committed`, `whole` and `left` by all who worked on them are
    counts.
    """

    def __init__(
        self, door: Door, terms: Terms, preferences: Preferences, trust: Trust, listener: Listener
    ) -> None:
        self._door = door
        self._terms = terms
        self._preferences = preferences
        self._place = Place(door.address, trust)
        self._listener = listener
        self._gathering = Gathering()
        self._keepers: list[Messages] = []
        self._arriving: list[Messages] = []  # of them, those whose tree is not here yet
        self._incomplete: set[Messages] = set()  # of them, those whose tree is here and misses pages
        self.committed = self.whole = self.left = 0

    def close(self) -> None:
        self._gathering.close()
        for keeper in self._keepers:
            keeper.close()

    def attend(self, timeout: float) -> None:
        """Whatever comes within `timeout` seconds: connections, and words of keepers."""
        watched = [self._door.fileno(), *(keeper.fileno() for keeper in self._keepers)]
        ready = readable(watched, timeout)
        self._open_door()
        for keeper in [each for each in self._keepers if each.fileno() in ready]:
            message = keeper.read()
            if message is not None:
                self._hear(keeper, *message)
            else:
                keeper.close()
                self._keepers.remove(keeper)
                self._has_arrived(keeper)
                self.left += keeper in self._incomplete

    def _open_door(self) -> None:
        channel = self._door.accept(0)
        if channel is None:
            return
        try:
            if channel.hello is not None and channel.hello.resume:
                hand_on(channel, channel.hello)
                return
            if channel.hello is not None and channel.hello.role is Role.CONTROL:
                self._demand_room(channel)
            link = self._gathering.add(channel)
        except (ConnectionLost, ProtocolError) as error:
            self._door.ended(channel, error)
            return
        if link is not None:
            keeper = keep(link, self._terms, self._preferences, self._place, [self._door, self])
            self._keepers.append(keeper)
            self._arriving.append(keeper)
            link.close()

    def _demand_room(self, channel: Channel) -> None:
        """Raises ConnectionLost when too many are on their way in; the peer is told so."""
        if len(self._arriving) >= MAX_ARRIVING:
            reason = f"{len(self._arriving)} trees are on their way in here; try again later"
            channel.refuse(reason, again=True)
            raise ConnectionLost(reason, where=channel.peer)

    def _has_arrived(self, keeper: Messages) -> None:
        """Or never will."""
        if keeper in self._arriving:
            self._arriving.remove(keeper)

    def _hear(self, keeper: Messages, kind: str, value: Any) -> None:
        if kind == "failed":
            self._listener(Note(str(value)))
        elif kind == "done":
            self._incomplete.discard(keeper)
            self.whole += 1
        else:
            if isinstance(value, StateChanged) and value.state == "committed":
                self.committed += 1
                self._has_arrived(keeper)
                self._incomplete.add(keeper)
            self._listener(value)
