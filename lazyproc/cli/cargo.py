"""The demo's cargo: compiled on the spot, and watched through its status page (cargo.c)."""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from lazyproc.errors import HostLacks, LazyprocError
from lazyproc.facts import dataclass
from lazyproc.model import PAGE

SOURCE = Path(__file__).with_name("cargo.c")
FLAGS = ("-std=gnu11", "-O2", "-pthread")
SLOWEST_OFFSET = 24
_STATUS = struct.Struct("<5Q")


class Phase(IntEnum):
    STARTING = 0
    RUNNING = 1
    VERIFIED = 2  # the last check of every page is done


class Status(NamedTuple):
    """One reading of the status page."""

    phase: int
    bad_words: int
    visits: int
    slowest_ns: int
    pages: int


@dataclass(frozen=True, slots=True)
class Cargo:
    """A cargo that can be started in any host that sees `directory`."""

    directory: Path
    mib: int
    threads: int

    @classmethod
    def compiled(cls, directory: Path, *, mib: int, threads: int) -> Cargo:
        """Compiles the program into `directory`. Raises HostLacks without gcc."""
        gcc = shutil.which("gcc")
        if gcc is None:
            raise HostLacks(
                "gcc, which compiles the demo's cargo, is missing", remedy="apt install gcc libc6-dev"
            )
        subprocess.run([gcc, *FLAGS, "-o", directory / "cargo", SOURCE], check=True)
        (directory / "status").write_bytes(bytes(PAGE))
        return cls(directory, mib, threads)

    @property
    def argv(self) -> list[str]:
        return [str(self.directory / "cargo"), str(self._path), str(self.mib), str(self.threads)]

    @property
    def _path(self) -> Path:
        return self.directory / "status"

    def status(self) -> Status:
        return Status(*_STATUS.unpack_from(self._path.read_bytes()))

    def forget_slowest(self) -> None:
        """From now on `slowest_ns` is that of what follows."""
        with open(self._path, "r+b", buffering=0) as file:
            file.seek(SLOWEST_OFFSET)
            file.write(bytes(8))

    def wait(self, condition: Callable[[Status], bool], what: str, deadline_s: float = 60.0) -> Status:
        """The first status for which `condition` holds. Raises LazyprocError naming `what` at the deadline."""
        until = time.monotonic() + deadline_s
        while not condition(status := self.status()):
            if time.monotonic() > until:
                raise LazyprocError(
                    f"the cargo did not {what} within {deadline_s:.0f} s", where=" ".join(self.argv)
                )
            time.sleep(0.01)
        return status
