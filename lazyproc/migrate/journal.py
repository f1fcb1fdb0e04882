"""The durable record of a migration: one JSON file a session, replaced atomically and fsynced at every state."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from lazyproc.errors import LazyprocError


def folder() -> Path:
    """lazyproc/sessions in $XDG_STATE_HOME; without it below /var/lib for root and ~/.local/state for others."""
    default = Path("/var/lib") if os.geteuid() == 0 else Path.home() / ".local/state"
    return Path(os.environ.get("XDG_STATE_HOME") or default) / "lazyproc/sessions"


class Journal:
    """The record of one session on this host."""

    def __init__(self, session: str, role: str) -> None:
        self._path = folder() / f"{session}-{role}.json"
        self._facts: dict[str, object] = {"id": session, "role": role}

    def write(self, state: str, **facts: object) -> None:
        """Record a state; on return it is on disk, after a power failure too.

        Raises LazyprocError when that cannot be; then there is no record of the session any more.
        """
        self._facts |= {"boot_id": _boot_id(), "state": state, **facts}
        draft = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(self._facts, file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(draft, self._path)
            _sync_folder(self._path.parent)
        except OSError as error:
            for path in (draft, self._path):
                with suppress(OSError):
                    path.unlink()
            raise LazyprocError(
                f"the journal cannot be written: {error.strerror}",
                where=str(self._path),
                remedy="make room there, or name another folder with XDG_STATE_HOME",
            ) from error

    def remove(self) -> None:
        """The session is over and nobody has to be told."""
        with suppress(OSError):
            self._path.unlink()


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
