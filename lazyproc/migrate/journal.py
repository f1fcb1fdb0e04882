"""The durable record of a migration: one JSON file a session, replaced atomically and fsynced at every state."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lazyproc.errors import LazyprocError


def folder() -> Path:
    """/var/lib/lazyproc/sessions for root, below $XDG_STATE_HOME for everybody else."""
    if os.geteuid() == 0:
        return Path("/var/lib/lazyproc/sessions")
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "lazyproc/sessions"


class Journal:
    """The record of one session on this host. Raises LazyprocError when it cannot be written."""

    def __init__(self, session: str, role: str) -> None:
        self._path = folder() / f"{session}-{role}.json"
        self._facts: dict[str, object] = {"id": session, "role": role, "boot_id": _boot_id()}
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, state: str, **facts: object) -> None:
        """Record a state; on return it is on disk, after a power failure too."""
        self._facts |= {"state": state, **facts}
        draft = self._path.with_suffix(".new")
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(self._facts, file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(draft, self._path)
            _sync_folder(self._path.parent)
        except OSError as error:
            raise self._failed(error) from error

    def remove(self) -> None:
        """The session is over and nobody has to be told."""
        self._path.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> LazyprocError:
        return LazyprocError(
            f"the journal cannot be written: {error.strerror}",
            where=str(self._path),
            remedy="make room there",
        )


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
