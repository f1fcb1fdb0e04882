"""The durable record of a migration: one JSON file a session and side, replaced atomically at every state.

Whoever finds it can tell who may run the tree, and finish the work: docs/reliability.md lists the states.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lazyproc.errors import HostLacks, LazyprocError, UsageError
from lazyproc.events import Listener, Note
from lazyproc.facts import dataclass
from lazyproc.kernel import proc
from lazyproc.private import make_folder

KEPT_S = 7 * 86400
SOURCE, DESTINATION = "source", "destination"
RELEASING = "releasing"  # at the source: it runs there, and parts of its memory are gone here
ENDED = ("aborted", "drained")  # what is kept for the other side to learn
ARRIVING = "arriving"  # at the destination: admitted, and not here yet
CALLED_OFF = "called off"  # a fact at the source: the other side has given it up, and why
ROOM = 1 << 14  # bytes, of which most records are shorter
COMMITTED = "committed"  # at the destination: decided, and the tree still ends with its tracer
DRAFTED = (COMMITTED, "running")


def folder() -> Path:
    """lazyproc/sessions in $XDG_STATE_HOME; without it below /var/lib for root and ~/.local/state for others. A
    relative one counts as none, as its specification has it: what is found must not depend on where a command is
    given. Raises HostLacks.
    """
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (named if named.is_absolute() else _state_home()) / "lazyproc/sessions"


def _state_home() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib")
    try:
        return Path.home() / ".local/state"
    except RuntimeError:  # no HOME, and a number that no database of users has
        raise HostLacks(
            "has no home for the journals", where=f"uid {os.geteuid()}", remedy="set HOME or XDG_STATE_HOME"
        ) from None


@dataclass(frozen=True, slots=True)
class Record:
    """What a journal says. `facts` are the state's own."""

    session: str
    role: str
    state: str
    since: float  # time.time() of the last change of state
    facts: Mapping[str, Any]

    @property
    def rebooted(self) -> bool:
        """Whether everything it speaks of has ended with this host's last run."""
        return self.facts.get("boot_id") != proc.boot_id()

    @property
    def called_off(self) -> str:
        """Why it runs nowhere else, when that is known of what is parked here."""
        return str(self.facts.get(CALLED_OFF, ""))

    @property
    def unborn(self) -> bool:
        """Whether the tree has not run at this destination; when nobody works on it, it never will. Of a host that was
        started again COMMITTED does not say that: what is written next is not durable.
        """
        if self.role != DESTINATION:
            return False
        return self.state == ARRIVING or (self.state == COMMITTED and not self.rebooted)


@dataclass(frozen=True, slots=True)
class Draft:
    """A record beside the one that holds."""

    state: str
    durable: bool
    path: Path
    facts: dict[str, Any]


class Journal:
    """The record of one session on this host. `facts` of an earlier process's journal are gone on with."""

    def __init__(self, session: str, role: str, facts: Mapping[str, object] | None = None) -> None:
        self.session = session
        self._path = folder() / f"{session}-{role}.json"
        self.facts: dict[str, Any] = {
            **(facts or {}),
            "id": session,
            "role": role,
        }  # of the last state written

    def write(self, state: str, *, durable: bool = True, **facts: object) -> None:
        """Record a state; facts of earlier states are kept. `durable`: on return it is on disk, after a power failure
        too; else it survives our own death only.

        Raises LazyprocError when that cannot be. What was recorded before still is, then; a durable write may have
        come to disk all the same, so whoever decides by it removes the record.
        """
        draft = self.draft(state, durable=durable, **facts)
        try:
            self.publish(draft)
        except LazyprocError:
            _remove(draft.path)
            raise
        self._discard()

    def draft(self, state: str, *, durable: bool = True, **facts: object) -> Draft:
        """The most of a `write`, ahead of time: nothing is recorded before `publish`. Raises LazyprocError."""
        written = self.facts | {"boot_id": proc.boot_id(), "state": state, "since": time.time(), **facts}
        draft = Draft(state, durable, self._beside(state), written)
        try:
            _write(draft.path, json.dumps(written).encode(), durable=durable)
        except LazyprocError:
            _remove(draft.path)
            raise
        return draft

    def make_room(self, state: str) -> None:
        """A durable draft of that state will find its blocks on the disk, which it then only has to fill. Raises
        LazyprocError.
        """
        _write(self._beside(state), b" " * ROOM, durable=True)

    def _beside(self, state: str) -> Path:
        return self._path.with_suffix(f".{state}")

    def publish(self, draft: Draft) -> None:
        """Record it; see `write`. A durable draft is on the disk already, and its name is when this returns."""
        with _blamed(self._path):
            os.rename(draft.path, self._path)
            if draft.durable:
                _sync_folder(self._path.parent)
        self.facts = draft.facts

    def _discard(self) -> None:
        """What was drafted, by whomever, and never published."""
        for state in DRAFTED:
            _remove(self._beside(state))

    def note(
        self, state: str, listener: Listener, facts: Mapping[str, object] = {}, *, durable: bool = False
    ) -> None:
        """`write` where nothing is decided by it: when it cannot be, `listener` is told, and all goes on."""
        try:
            self.write(state, durable=durable, **facts)
        except LazyprocError as error:
            self.facts |= {"state": state, **facts}
            listener(Note(f"session {self.session}: {error}"))

    def call_off(self, why: str) -> None:
        """What is parked runs nowhere else, and never will."""
        self.facts[CALLED_OFF] = why
        with suppress(LazyprocError):
            self.write(self.facts["state"], durable=False)

    def reload(self) -> None:
        """What another process of ours has written since. Without a record the state is ""."""
        try:
            self.facts = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self.facts = {}

    def remove_if(self, state: str) -> None:
        """Remove it unless it has come further."""
        if self.facts.get("state") == state:
            self.remove()

    def remove(self) -> None:
        """The session is over and nobody has to be told."""
        _remove(self._path)
        self._discard()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """No other process of this host is inside for another session. Raises LazyprocError.

    Whoever is killed inside before the commit lets go: those who have his descriptors end then.
    """
    with _blamed(folder()):
        make_folder(folder())
        fd = os.open(folder(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _write(path: Path, data: bytes, *, durable: bool) -> None:
    """Over what is there: a file that does not grow has nothing but its data to be synced. Spaces fill it up, which are
    nothing to JSON.
    """
    with _blamed(path):
        make_folder(path.parent)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data.ljust(os.fstat(file.fileno()).st_size))
            file.flush()
            if durable:
                os.fdatasync(file.fileno())


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LazyprocError(
            f"the journal cannot be written: {error.strerror}",
            where=str(path),
            remedy="make room there, or name another folder with XDG_STATE_HOME",
        ) from error


def records() -> Iterator[Record]:
    """Of all sessions on this host, the oldest first. What cannot be read is named by its state `garbled`."""
    for path in sorted(folder().glob("*.json"), key=lambda path: path.name):
        session, _, role = path.stem.rpartition("-")
        try:
            facts = json.loads(path.read_text())
            yield Record(session, role, str(facts["state"]), float(facts.get("since", 0)), facts)
        except FileNotFoundError:  # it has just ended
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield Record(session, role, "garbled", 0.0, {"reason": f"{path}: {error}"})


def forget_old() -> None:
    """Remove what was kept for another host to learn, and it never asked."""
    for record in records():
        if (record.state in ("aborted", "drained") or record.unborn) and time.time() - record.since > KEPT_S:
            Journal(record.session, record.role).remove()


def find(session: str, role: str = "") -> Record:
    """The record of a session, or of that side of it, which may also be named as ID-source or ID-destination. Raises
    UsageError when there is none, or one on each side.
    """
    name, _, side = session.rpartition("-")
    if side in (SOURCE, DESTINATION):
        session, role = name, side
    found = [record for record in records() if record.session == session and role in ("", record.role)]
    if not found:
        raise UsageError("no such session on this host", where=session, remedy="see lazyproc sessions")
    if len(found) > 1:  # both ends are on this host and share one folder
        raise UsageError(
            "both sides of this session are on this host",
            where=session,
            remedy=f"say which: {session}-{SOURCE} or {session}-{DESTINATION}",
        )
    return found[0]


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
