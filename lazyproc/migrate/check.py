"""Whether a receiver can be reached, lets us in and is a host that trees of this one can move to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from lazyproc.errors import ConnectionLost, PermissionDenied, ProtocolError
from lazyproc.host_check import Finding, State
from lazyproc.migrate.about import about_here, about_in, fit
from lazyproc.migrate.asking import ONLY_ASKED, PREPARE_S
from lazyproc.migrate.link import Link, dialled
from lazyproc.migrate.talk import expect
from lazyproc.pages.dial import Unreachable
from lazyproc.pages.peer import Trust
from lazyproc.pages.tls import Tls
from lazyproc.wire.native import REVISION, VERSION, Ask, Host, Party

LET_IN = "start the receiver with --insecure, or with --allow-uid for a user of its own host"


def check_peer(target: str, *, insecure: bool, tls: Tls | None = None) -> tuple[Finding, ...]:
    """What can be said of the receiver at `target` (HOST:PORT) as a destination for trees of this host.

    Raises UsageError for the address; ConnectionLost and ProtocolError when a receiver that let us in fails then.
    """
    with ExitStack() as stack:
        try:
            link = stack.enter_context(dialled(target, Party.SOURCE, Trust(insecure, tls=tls)))
        except Unreachable as error:
            return (Finding("peer: reachable", State.MISSING, error.what, error.remedy),)
        except PermissionDenied as error:
            return (_reached(), Finding("peer: trusted", State.MISSING, error.what, error.remedy))
        except ConnectionLost as error:  # who is not let in is hung up on without an answer
            detail = f"{error.what}: it does not let us in, or is no lazyproc"
            remedy = (error.remedy if tls else "") or LET_IN
            return (_reached(), Finding("peer: let in", State.MISSING, detail, remedy))
        except ProtocolError as error:
            remedy = error.remedy or "use the same version of lazyproc on both hosts"
            return (_reached(), Finding("peer: protocol", State.MISSING, error.what, remedy))
        return tuple(_asked(link))


def _reached() -> Finding:
    return Finding("peer: reachable", State.OK, "it answers")


def _asked(link: Link) -> Iterator[Finding]:
    control = link.control
    yield Finding(
        "peer: reachable", State.OK, f"it answers; a round trip takes {control.rtt_us / 1e3:.2f} ms"
    )
    yield Finding("peer: let in", State.OK, "it lets us in")
    if control.peer_revision == 0:
        detail = f"version {VERSION}, but it is too old to tell about itself"
        yield Finding("peer: protocol", State.DEGRADED, detail, "use the same lazyproc on both hosts")
        return
    yield Finding(
        "peer: protocol", State.OK, f"version {VERSION}, revision {min(REVISION, control.peer_revision)}"
    )
    control.send(Ask())
    there = about_in(expect(control, Host, PREPARE_S))
    control.send(ONLY_ASKED)
    yield from fit(about_here(), there)
