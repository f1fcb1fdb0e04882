"""The trace file: one record a fault, behind one line that says what they are. docs/trace.md describes it.

The records are those of the pager's C core, byte for byte, so that writing them costs a copy and no Python.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from lazyproc.errors import ImageError, LazyprocError
from lazyproc.events import Listener, Note, ignore
from lazyproc.facts import dataclass
from lazyproc.model import PAGE

VERSION = 1
HEADER_BYTES = 1024
RECORD = struct.Struct("<4q3Q4I")
FIELDS = (
    ("time", "<i8"),
    ("queued", "<i8"),
    ("sent", "<i8"),
    ("installed", "<i8"),
    ("addr", "<u8"),
    ("object", "<u8"),
    ("object_addr", "<u8"),
    ("vpid", "<u4"),
    ("tid", "<u4"),
    ("outcome", "<u4"),
    ("source", "<u4"),
)
OUTCOMES = ("installed", "present", "deferred", "gone")  # enum outcome of _ledger.h
SOURCES = ("none", "zero", "urgent", "bulk", "dropped", "eager")  # enum page_class of _ledger.h
_READ = 4096  # records


@dataclass(frozen=True, slots=True)
class Clock:
    """One moment on both clocks of the host that recorded, in ns: what turns times of the trace into times of day."""

    monotonic_ns: int
    realtime_ns: int

    @classmethod
    def now(cls) -> Clock:
        return cls(time.monotonic_ns(), time.time_ns())


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. Times are CLOCK_MONOTONIC of the host where the tree runs, in ns; 0: that did not happen."""

    time_ns: int  # its message was read
    queued_ns: int  # its page was asked for; 0 when the page was at hand, or asked for already
    sent_ns: int  # the request had left
    installed_ns: int  # the thread was woken
    addr: int  # of the page, in the process
    object: int  # MemoryObject.key, 0 when the address belongs to none (a grown stack, mremap)
    object_addr: int
    vpid: int  # of a child forked while pages were missing: the tid of its first fault
    tid: int  # as its own pid namespace numbers it
    outcome: str  # of OUTCOMES
    source: str  # of SOURCES: "bulk" when the page came that way first, "zero" when it had no content

    @property
    def waited_ns(self) -> int:
        """What `fault_us` of the reports counts."""
        return self.installed_ns - self.time_ns


def decode(records: bytes) -> Iterator[Fault]:
    """The faults in a whole number of records. Raises ImageError for codes that version 1 does not have."""
    for *numbers, outcome, source in RECORD.iter_unpack(records):
        if outcome >= len(OUTCOMES) or source >= len(SOURCES):
            raise ImageError(f"a fault has outcome {outcome} and source {source}, which mean nothing")
        yield Fault(*[*numbers, OUTCOMES[outcome], SOURCES[source]])


# --- reading --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace file. Iterating reads the faults, in the order in which they ended."""

    path: Path
    session: str  # of the migration; empty when images were restored
    clock: Clock
    lost: int  # faults that are not in the file

    def __len__(self) -> int:
        """Whole records that are there now."""
        return max(0, self.path.stat().st_size - HEADER_BYTES) // RECORD.size

    def __iter__(self) -> Iterator[Fault]:
        with self.path.open("rb") as file:
            file.seek(HEADER_BYTES)
            while data := file.read(_READ * RECORD.size):
                yield from decode(data[: len(data) // RECORD.size * RECORD.size])


def read_trace(path: Path | str) -> Trace:
    """The trace that `restore --trace` or `migrate --trace` has written, or still writes, to `path`.

    Raises ImageError for anything else, OSError.
    """
    with open(path, "rb") as file:
        line = file.read(HEADER_BYTES)
    try:
        header = json.loads(line)
        if header["lazyproc_trace"] != VERSION or len(line) != HEADER_BYTES:
            raise ValueError
        clock = Clock(int(header["monotonic_ns"]), int(header["realtime_ns"]))
        return Trace(Path(path), str(header["session"]), clock, int(header["lost"]))
    except (ValueError, TypeError, KeyError):
        raise ImageError(
            f"is no trace of version {VERSION}", where=str(path), remedy="name what --trace or --record wrote"
        ) from None


# --- writing --------------------------------------------------------------------------------------------


def header(session: str, clock: Clock, lost: int) -> bytes:
    """The first line, padded to HEADER_BYTES so that it can be written again."""
    fields = {
        "lazyproc_trace": VERSION,
        "header_bytes": HEADER_BYTES,
        "session": session,
        "clock": "CLOCK_MONOTONIC",
        "monotonic_ns": clock.monotonic_ns,
        "realtime_ns": clock.realtime_ns,
        "lost": lost,
        "page_bytes": PAGE,
        "record": FIELDS,
        "outcomes": OUTCOMES,
        "sources": SOURCES,
    }
    return json.dumps(fields).encode().ljust(HEADER_BYTES - 1) + b"\n"


class TraceFile:
    """A trace that is being written. A context manager.

    What was in the file stays until `begin`. Nothing but the constructor raises: a full disk ends the trace, not the
    work that is traced, and `listener` is told.
    """

    def __init__(self, path: Path | str, listener: Listener = ignore) -> None:
        """Raises LazyprocError when the file cannot be written."""
        self._path = str(path)
        self._listener = listener
        self._session, self._clock, self._lost = "", Clock(0, 0), 0
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise self._refused(error.strerror) from None
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self.close()
            raise self._refused("it is not an ordinary file")

    def _refused(self, why: str | None) -> LazyprocError:
        return LazyprocError(
            f"the trace cannot be written: {why}",
            where=self._path,
            remedy="name another file with --trace or --record",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, session: str, clock: Clock) -> None:
        """An empty trace of `session`, recorded by a host with this clock."""
        self._session, self._clock = session, clock
        self._attempt(self._begin)

    def write(self, records: bytes, lost: int) -> None:
        """Append records; `lost` is how many have been lost so far."""
        self._attempt(lambda: self._append(records, lost))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _begin(self) -> None:
        os.fchmod(self._fd, 0o600)  # where its memory lies is nobody else's business
        os.ftruncate(self._fd, 0)
        self._append(header(self._session, self._clock, 0), 0)

    def _append(self, data: bytes, lost: int) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        if lost != self._lost:
            self._lost = lost
            os.pwrite(self._fd, header(self._session, self._clock, lost), 0)

    def _attempt(self, work: Callable[[], None]) -> None:
        if self._fd < 0:
            return
        try:
            work()
        except OSError as error:
            self.close()
            self._listener(Note(f"{self._path}: the trace ends here: {error.strerror}"))
