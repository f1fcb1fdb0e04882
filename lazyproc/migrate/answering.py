"""The destination's answers before the freeze: what this host is, and what here stands in a tree's way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from lazyproc.errors import HostLacks, LazyprocError, Obstacle, RestoreError, UsageError
from lazyproc.facts import dataclass, replace
from lazyproc.limits import raise_limits
from lazyproc.migrate.needs import needs_in
from lazyproc.migrate.prepare import Offer, objections, vdso_build_id
from lazyproc.migrate.promises import promises
from lazyproc.migrate.room import Room, least_room, short_of_tasks
from lazyproc.migrate.talk import checked, next_event
from lazyproc.migrate.whom import Whom
from lazyproc.needs import FeatureNeed, PidNeed, Wanted
from lazyproc.pages.channel import Channel
from lazyproc.restore.groups import whereabouts
from lazyproc.restore.tree import Pidns, wants_new_pidns
from lazyproc.uffd.policy import POLICIES
from lazyproc.wire.jsonobject import JsonValue
from lazyproc.wire.native import Ask, Forecast, Needs, Prepare

AND_OURS = 2  # tasks of its groups: the nursery, and one that stands in for a process that has ended
MODES = ("postcopy", "stopcopy")
LAZY = ("userfaultfd of tasks",)
OWN = ("descriptors", "tables")  # what limits may keep from us
ALWAYS = (*OWN, "ptrace", "pidfd_getfd", "children", "choose pids", "time namespaces")  # of host_check


@dataclass(frozen=True, slots=True)
class Heard:
    """The fields of PREPARE, the needs, and the forecast as it came, when one has."""

    order: Mapping[str, JsonValue]
    wanted: tuple[Wanted, ...]
    forecast: bytes | None


def heard(control: Channel, timeout: float) -> Heard:
    """PREPARE, and what came before it; questions about this host are answered meanwhile.

    Raises Refused when the source only wanted to ask, ConnectionLost, ProtocolError.
    """
    deadline = time.monotonic() + timeout
    wanted: tuple[Wanted, ...] = ()
    forecast: bytes | None = None
    while True:
        event = next_event(control, deadline - time.monotonic(), Prepare.__name__)
        if isinstance(event, Ask):
            from lazyproc.migrate.about import host_frame

            control.send(host_frame())
        elif isinstance(event, Needs):
            wanted = needs_in(event)
        elif isinstance(event, Forecast):
            forecast = event.data
        else:
            return Heard(checked(event, Prepare, control).fields, wanted, forecast)


def groups_here(cgroup: str | None) -> Mapping[str, str] | LazyprocError:
    """The cgroups in which a tree would be, by controllers, or what is against the one that was named."""
    try:
        return whereabouts(cgroup)
    except (RestoreError, UsageError) as error:
        return error


def obstacles_here(
    order: Mapping[str, JsonValue],
    wanted: Sequence[Wanted],
    groups: Mapping[str, str] | LazyprocError,
    *,
    pidns: Pidns,
    overcommit: bool,
    whom: Whom | None = None,
) -> Iterator[Obstacle]:
    """Everything about this host that would stop a restore of the tree; `groups` as `groups_here` gives them. Without
    `whom` it may run as anybody.

    Raises ProtocolError.
    """
    if "guest" in order:
        yield Obstacle(
            0, "host", "takes process trees in, and no guests of QEMU",
            "start the receiver with QEMU's command line: receive --listen HOST:PORT -- qemu-system-x86_64 ...",
        )  # fmt: skip
        return
    if isinstance(groups, LazyprocError):
        yield Obstacle(0, "host", f"{groups.where}: {groups.what}", groups.remedy)
        groups = {}
    room = Room(1 << 62) if overcommit else least_room(groups, tuple(promises()))
    yield from objections(Offer.of(order), room)
    yield from short_of_tasks(groups, len(numbers_of(wanted)) + AND_OURS)
    if order.get("policy") not in POLICIES or order.get("mode") not in MODES:
        why = f"policy {order.get('policy')!r} or mode {order.get('mode')!r} is not known here"
        yield Obstacle(0, "host", why, "choose another, or use the same lazyproc on both hosts")
    lazy = LAZY if order.get("mode") == "postcopy" else ()
    yield from _features(wanted, lazy, pidns)
    if whom is not None:
        yield from whom.obstacles(wanted)
    from lazyproc.restore.needs import unmet

    for each, lack in unmet(wanted, pidns=pidns, users=whom.users if whom else ()):
        yield Obstacle(each.pid, each.where, f"{lack.where}: {lack.what}", lack.remedy)


def obstacles_to_guest(order: Mapping[str, JsonValue], *, overcommit: bool) -> Iterator[Obstacle]:
    """The same for the guest of a QEMU, at a receiver that has the command line of one. The processor and the kernel
    are QEMU's business. Raises ProtocolError.
    """
    if "guest" not in order:
        yield Obstacle(
            0, "host", "takes guests of QEMU in, and no process trees",
            "start another receiver there without a command line, or name the guest's monitor with --qemu",
        )  # fmt: skip
        return
    room = Room(1 << 62) if overcommit else least_room({}, tuple(promises()))
    offer = replace(Offer.of(order), cpu={}, vdso=vdso_build_id().hex())
    yield from objections(offer, room)
    if order.get("policy") not in POLICIES or order.get("mode") != "postcopy":
        why = f"policy {order.get('policy')!r} or mode {order.get('mode')!r} is not known here for guests"
        yield Obstacle(0, "host", why, "choose another, or use the same lazyproc on both hosts")
    yield from _features((), LAZY, "host")


def demand_own() -> None:
    """What every tree and guest takes of our own limits. Raises HostLacks."""
    from lazyproc.host_check import unmet

    raise_limits()
    for finding in unmet(OWN):
        raise HostLacks(finding.detail, remedy=finding.remedy)


def numbers_of(wanted: Sequence[Wanted]) -> list[int]:
    """The numbers of the tree's processes and threads, the root's first; none when its source is older than that."""
    return [each.need.number for each in wanted if isinstance(each.need, PidNeed)]


def _features(wanted: Sequence[Wanted], lazy: Sequence[str], pidns: Pidns) -> Iterator[Obstacle]:
    """What a restore takes of this kernel, and what this tree takes besides."""
    from lazyproc.host_check import unmet

    whose = {each.need.name: each for each in wanted if isinstance(each.need, FeatureNeed)}
    new = wants_new_pidns(pidns, numbers_of(wanted))
    for finding in unmet({*ALWAYS, *lazy, *whose, *(["pid namespaces"] if new else [])}):
        each = whose.get(finding.name)
        pid, where = (each.pid, each.where) if each else (0, "host")
        yield Obstacle(pid, where, f"{finding.name}: {finding.detail}", finding.remedy)
