"""What is under way or parked on this host, and what an operator can do about it: `sessions`, `resume`, `abort`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lazyproc.errors import NoSuchProcess, UsageError
from lazyproc.events import Listener, ignore
from lazyproc.facts import asdict, dataclass
from lazyproc.kernel import netfilter, proc
from lazyproc.kernel.sys import pidfd_open
from lazyproc.migrate.desk import has_desk, is_staffed
from lazyproc.migrate.guest_records import ways_of, went_alone
from lazyproc.migrate.held import held_by
from lazyproc.migrate.journal import DESTINATION, ENDED, RELEASING, SOURCE, Journal, Record, find, records
from lazyproc.migrate.promises import pages_remaining
from lazyproc.migrate.supply import Supply
from lazyproc.restore.ending import end_tree
from lazyproc.restore.lazytree import from_facts

ORPHANED, GONE = "orphaned", "gone"
AWAITING = ("committed", "running")  # at the destination: pages may be missing
RUNS_THERE = ("committed", "running", RELEASING)  # at the source
STANDING = "TtZX"  # states of a process
STOP_S, LOOK_S = 2.0, 0.001


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One side of a session on this host. The states are listed in docs/reliability.md; pids are this host's."""

    id: str
    role: str
    peer: str
    state: str
    since: float  # seconds since 1970
    reason: str
    root_pid: int | None
    pager_pid: int | None
    guard_pid: int | None
    keeper_pid: int | None
    pages_remaining: int | None


def sessions() -> list[SessionInfo]:
    """The migrations, and restores that still bring pages, of this host that are under way or parked, the oldest first.
    Raises HostLacks without a home for the journals.
    """
    return sorted((_info(record) for record in records()), key=lambda info: info.since)


def _info(record: Record) -> SessionInfo:
    facts, state = record.facts, state_of(record)
    tree = facts.get("tree") or {}
    alive = state not in (ORPHANED, GONE)
    return SessionInfo(
        id=record.session,
        role=record.role,
        peer=str(facts.get("peer", "")),
        state=state,
        since=record.since,
        reason=str(facts.get("reason", "")) if alive else _left_alone(record),
        root_pid=tree.get("root_pid", facts.get("root_pid")),
        pager_pid=facts.get("pager_pid") if alive else None,
        guard_pid=facts.get("guard_pid") if alive else None,
        keeper_pid=facts.get("keeper_pid") if alive else None,
        pages_remaining=pages_remaining(facts) if record.role == DESTINATION else None,
    )


def _left_alone(record: Record) -> str:
    left = f"was called off: {record.called_off}" if record.called_off else f"was {record.state}"
    words = f"{left}; nobody works on it"
    return f"{words}: {ways_of(record)}" if went_alone(record) and not record.rebooted else words


def state_of(record: Record) -> str:
    """The state, as it is now: a journal knows nothing of who was killed since."""
    if record.state in ("garbled", *ENDED):
        return record.state
    staffed = is_staffed(record.session, record.role) or _is_staffed_elsewhere(record)
    if record.unborn and not staffed:
        return "aborted"  # nobody is left who could commit it, and a source in doubt is told so
    if record.rebooted:
        return GONE
    return record.state if staffed else ORPHANED


def _is_staffed_elsewhere(record: Record) -> bool:
    """By processes in another network namespace (ip netns exec), whose desk cannot be seen from here."""
    return any(has_desk(pid, record.session, record.role) for pid in _numbers(record))


def resume(
    session: str,
    *,
    here: bool = False,
    force: bool = False,
    directory: Path | str | None = None,
    poison: bool = False,
    retry_for: float | None = None,
    listener: Listener = ignore,
) -> Mapping[str, object] | None:
    """Go on with a session that nobody works on any more; returns the report when its memory is complete.

    At the source the pages are served again; `here` lets its tree run on instead, which is right only if it does not
    run at the destination: so it takes `force` too. At the destination the missing pages are awaited from the source,
    or, also while they are awaited, taken from the images in `directory`; with `poison` those that are in no images are
    lost, and who touches one gets SIGBUS (`pages_poisoned` in the report). `force` takes images of another moment, and
    gives a source up that still answers. A lost connection is opened again for `retry_for` seconds (None: until it
    comes). Raises UsageError, ImageError, HostLacks, Parked (the images lack pages), and
    what `migrate` raises.
    """
    record = find(session)
    session = record.session
    supply = Supply(
        str(Path(directory).resolve()) if directory else "", poison, record.facts.get("criu") is True
    )
    if supply and here:
        raise UsageError(
            "--here is for the source of a session, --from and --poison are for its destination", where=session,
            remedy="give what is for the side of it on this host",
        )  # fmt: skip
    if supply:
        return _supply(record, supply, force, listener)
    _demand_orphaned(record)
    if record.role == SOURCE and here:
        _run_here(record, force)
        return None
    if record.role == SOURCE and "dumped" in record.facts:
        raise UsageError(
            "its client was CRIU's, or spoke its language, and cannot come back", where=session,
            remedy="make sure that it does not run elsewhere, and add --here --force; or end it with lazyproc abort",
        )  # fmt: skip
    if went_alone(record):
        if held_by(record.facts).ended() is not None:
            raise _nothing_left(record)
        raise UsageError(
            "its guest went to a QEMU that nobody of lazyproc's is beside",
            where=session,
            remedy=ways_of(record),
        )
    if record.role == SOURCE:
        from lazyproc.migrate.moving import migrate_on

        return asdict(migrate_on(record, retry_for=retry_for, listener=listener))
    if here:
        raise UsageError(
            "--here is for the source of a session", where=session, remedy="use resume without it"
        )
    from lazyproc.migrate.criu_supply import is_held
    from lazyproc.migrate.keeping import keep_on

    recorded = Supply.of(record.facts.get("supply") or {})
    own = Supply.of(record.facts)  # of a lazy restore, which has images
    if own.server and not is_held(session):
        raise UsageError(
            "CRIU's page server is lost, and with it the way to the missing pages", where=session,
            remedy=f"name images of the same moment with resume {session} --from DIR, or give them up with --poison",
        )  # fmt: skip
    return keep_on(record, recorded if record.state == "poisoned" else own, listener)


def _supply(record: Record, supply: Supply, force: bool, listener: Listener) -> Mapping[str, object]:
    """The destination's tree is completed without its source, whether somebody works on it or not."""
    from lazyproc.migrate.keeping import keep_on, supply_to

    if record.role == SOURCE:
        raise UsageError(
            "--from and --poison are for the destination of a session", where=record.session,
            remedy="use resume without them",
        )  # fmt: skip
    state = state_of(record)
    if state not in AWAITING:
        _demand_orphaned(record)
    elif not record.facts.get("reason") and not force:
        raise UsageError(
            "its source is there, and its pages come from it", where=record.session,
            remedy="wait for them, or give it up with --force",
        )  # fmt: skip
    supply.demand_fits(record, force=force)
    if state in AWAITING:
        return supply_to(record, supply, listener)
    return keep_on(record, supply, listener)


def _demand_orphaned(record: Record) -> None:
    state = state_of(record)
    if state in ENDED:
        raise UsageError("has ended; only the other side does not know it yet", where=record.session)
    if state == GONE:
        raise _nothing_left(record)
    if state != ORPHANED:
        raise UsageError(
            "is being worked on", where=record.session, remedy="see its processes in lazyproc sessions"
        )


def _nothing_left(record: Record) -> UsageError:
    """The record goes with it."""
    Journal(record.session, record.role).remove()
    return UsageError("nothing is left of it on this host", where=record.session)


def _run_here(record: Record, force: bool) -> None:
    """The operator knows that the tree does not run elsewhere, or takes the risk."""
    if record.state == RELEASING:
        raise UsageError(
            "it runs on the other host, and parts of its memory are freed here (migrate --release): it can never run "
            "here again",
            where=record.session,
            remedy="let the rest follow with lazyproc resume, or end it with lazyproc abort",
        )
    if record.state in RUNS_THERE:
        raise UsageError(
            "it runs on the other host: a second copy here would be another process with the same past",
            where=record.session,
            remedy="let its memory follow with lazyproc resume, or end it with lazyproc abort",
        )
    if record.state == "parked" and not (force or record.called_off):
        raise UsageError(
            "it is not known whether it runs on the other host; if it does, it would run twice",
            where=record.session,
            remedy="make sure that it does not run there, and add --force",
        )
    from lazyproc.migrate.going_on import run_on

    held = held_by(record.facts) if record.state == "parked" else None
    run_on(Journal(record.session, SOURCE, record.facts), held)


@dataclass(frozen=True, slots=True)
class AbortReport:
    """What `abort` has ended. `pages_missing` at the destination: those that had not come, which are lost with it."""

    session: str
    role: str
    state: str
    pages_missing: int | None
    text: str  # all of it, as a sentence


def abort(session: str) -> AbortReport:
    """End what is left of a session on this host, its tree included; `session` as in `sessions`. Raises UsageError when
    there is none.
    """
    with _stopped_helpers(find(session)) as record:
        state, left = state_of(record), None
        if state not in (GONE, *ENDED):
            left = pages_remaining(record.facts)
            _end_tree(record)
    if record.role == SOURCE:
        netfilter.release_session(record.session)
    journal = Journal(record.session, record.role, record.facts)
    if record.unborn and state not in ENDED:  # its source may have said COMMIT, and will ask
        journal.write("aborted", reason="it was ended there before it ran")
    else:
        journal.remove()
    return AbortReport(record.session, record.role, state, left, _what_it_means(record, state, left))


def _what_it_means(record: Record, state: str, left: int | None) -> str:
    ended = f"session {record.session} ({record.role}, {state}) is ended"
    if left is not None:
        return f"{ended}, {left} of its pages were missing"
    if record.role == SOURCE and state not in (GONE, *ENDED):
        if record.state == "parked" and not record.called_off:
            return f"{ended}, with its process, of which it was not known whether it runs on the other host"
        if record.state in RUNS_THERE:
            return f"{ended}; what the process on the other host has not got of its memory is lost"
    return ended


@contextmanager
def _stopped_helpers(record: Record) -> Iterator[Record]:
    """They neither bring pages nor see one another's end inside, and are killed at the end: not before, since a forked
    child whose userfaultfd nobody has reads zeros. What is given is the record when all of them stand still.
    """
    helpers: dict[int, int] = {}  # pidfds, -1 where the number is somebody else's by now
    with ExitStack() as stack:
        try:
            while new := _numbers(record) - helpers.keys():
                helpers |= {pid: _helper(pid, record, stack) for pid in new}
                _signal(helpers.values(), signal.SIGSTOP)
                _await_stop(pid for pid, pidfd in helpers.items() if pidfd >= 0)
                record = find(record.session, record.role)
            yield record
        except BaseException:
            _signal(helpers.values(), signal.SIGCONT)
            raise
        _signal(helpers.values(), signal.SIGKILL)


def _numbers(record: Record) -> set[int]:
    pids = (record.facts.get(f"{name}_pid") for name in ("guard", "keeper", "pager", "server"))
    return {int(pid) for pid in pids if pid}


def _helper(pid: int, record: Record, stack: ExitStack) -> int:
    try:
        pidfd = pidfd_open(pid)
    except ProcessLookupError:
        return -1
    stack.callback(os.close, pidfd)
    return pidfd if has_desk(pid, record.session, record.role) else -1


def _await_stop(pids: Iterable[int]) -> None:
    """A signal that was sent is not heard yet."""
    until = time.monotonic() + STOP_S
    for pid in pids:
        with suppress(NoSuchProcess):
            while proc.stat(proc.read(pid, "stat")).state not in STANDING and time.monotonic() < until:
                time.sleep(LOOK_S)


def _signal(pidfds: Iterable[int], number: int) -> None:
    for pidfd in pidfds:
        if pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)


def _end_tree(record: Record) -> None:
    if record.role == SOURCE and record.state in ("parked", *RUNS_THERE):
        held_by(record.facts).end()
    if "tree" in record.facts:
        end_tree(from_facts(record.facts["tree"]))
    if record.facts.get("server"):
        from lazyproc.migrate.criu_supply import let_source_run

        let_source_run(record.session)
