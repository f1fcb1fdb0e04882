"""The page server: C threads (_server.h) that answer GET frames, one thread a connection, without the GIL."""

from __future__ import annotations

import errno
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Self, TypeAlias

from lazyproc.errors import HostLacks, LazyprocError, UsageError
from lazyproc.facts import annotations_of, dataclass
from lazyproc.model import PAGE, MemoryObject
from lazyproc.pages._server import ffi, lib
from lazyproc.pages.frozen import ProcessSegment

FileSegment: TypeAlias = tuple[int, int, int, int, int]  # MemoryObject.key, start, end, fd, file offset


@dataclass(frozen=True, slots=True)
class ServerCounters:
    """What a channel has carried so far; `pages`, `zero` and `absent` in pages."""

    requests: int = 0
    pages: int = 0  # with content
    zero: int = 0
    absent: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    under_way: int = 0  # pages not sent, since the other channel had them

    def __add__(self, other: ServerCounters) -> ServerCounters:
        return ServerCounters(
            *(getattr(self, name) + getattr(other, name) for name in annotations_of(ServerCounters))
        )


class PageServer:
    """Serves the segments of FrozenPages or ImagePages, which must stay open until `stop`. A context manager.

    Raises UsageError when segments overlap or are not whole pages, HostLacks without SSE4.2 and PCLMULQDQ.
    """

    def __init__(self, segments: Iterable[ProcessSegment | FileSegment], *, releasing: bool = False) -> None:
        """`releasing`: pages are freed as they are acknowledged, see `release`."""
        rows = sorted((_row(segment) for segment in segments), key=lambda row: (row["object"], row["start"]))
        table = ffi.new("struct server_segment[]", rows)
        result = ffi.new("struct server **")
        error = -lib.server_new(table, len(rows), releasing, result)
        if error == errno.ENOTSUP:
            raise HostLacks("the processor has no SSE4.2 or no PCLMULQDQ", remedy="use one made after 2010")
        if error:
            raise UsageError(f"the table of {len(rows)} segments is refused: {os.strerror(error)}")
        self._server = ffi.gc(result[0], lib.server_free)
        self._connections: dict[str, list[int]] = defaultdict(list)
        self._lock = threading.Lock()  # the C calls below release the GIL and take turns

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def serve(self, fd: int, name: str) -> None:
        """Answers the requests on `fd`, a connected stream socket, which is the server's from now on.

        A name may be served again, after a reconnect; its counters go on. Raises LazyprocError when the
        thread cannot be started; `fd` is still the caller's then.
        """
        with self._lock:
            number = lib.server_serve(self._server, fd, name == "bulk")
            if number < 0:
                raise LazyprocError(
                    f"cannot serve pages on it: {os.strerror(-number)}", where=f"fd {fd} ({name})"
                )
            self._connections[name].append(number)

    def counters(self) -> Mapping[str, ServerCounters]:
        """Per name; also after `stop`."""
        with self._lock:
            return {
                name: sum((_counters(self._status(number)) for number in numbers), ServerCounters())
                for name, numbers in self._connections.items()
            }

    def ended(self, name: str) -> str | None:
        """Why the newest connection of that name has ended, None while it is served."""
        with self._lock:
            return _reason(self._status(self._connections[name][-1]))

    def new_link(self) -> None:
        """The connections that are served are lost: what was on its way over them may be asked for again."""
        with self._lock:
            lib.server_new_link(self._server)

    def release(self, obj: MemoryObject, addr: int, pages: int) -> int:
        """From here on these pages may be freed: none is read any more. Returns how many the server has."""
        return int(lib.server_release(self._server, obj.key, addr, pages))

    def freed_and_asked_for(self) -> int | None:
        """The address of a page that a client of the last link wanted though it had been released."""
        return self._newest_ended(lib.SERVER_RELEASED)

    def source_ended(self) -> int | None:
        """The pid of a process whose pages a client of the last link wanted, and which has ended."""
        return self._newest_ended(lib.SERVER_SOURCE_GONE)

    def _newest_ended(self, cause: int) -> int | None:
        """What is said of the newest connection of a name that has ended for this cause."""
        with self._lock:
            for numbers in self._connections.values():
                status = self._status(numbers[-1])
                if status.cause == cause:
                    return int(status.detail)
        return None

    def stop(self) -> None:
        """Ends every connection and waits for the threads."""
        with self._lock:
            lib.server_stop(self._server)

    def _status(self, number: int) -> Any:
        status = ffi.new("struct server_status *")
        lib.server_status(self._server, number, status)
        return status


def crc32c(pages: bytes | bytearray | memoryview) -> int:
    """CRC32C of whole pages."""
    return int(lib.server_crc32c(ffi.from_buffer(pages), len(pages) // PAGE))


def _row(segment: ProcessSegment | FileSegment) -> dict[str, int]:
    """As struct server_segment."""
    if isinstance(segment, ProcessSegment):
        row = segment._asdict()
        return {"where": row.pop("addr"), "fd": row.pop("mem"), **row}
    obj, start, end, fd, offset = segment
    return {"object": obj, "start": start, "end": end, "where": offset, "pid": 0, "pidfd": -1, "fd": fd}


def _counters(status: Any) -> ServerCounters:
    return ServerCounters(*(getattr(status, name) for name in annotations_of(ServerCounters)))


def _reason(status: Any) -> str | None:
    return {
        lib.SERVER_RUNNING: None,
        lib.SERVER_CLOSED: "the client closed it",
        lib.SERVER_HUNG_UP: "the client hung up without saying so",
        lib.SERVER_BAD_FRAME: f"the client sent a bad request (frame type {status.detail})",
        lib.SERVER_SOCKET_ERROR: os.strerror(status.error),
        lib.SERVER_SOURCE_GONE: f"pid {status.detail}, whose pages were asked for, has ended",
        lib.SERVER_RELEASED: f"the page at {status.detail:#x} was acknowledged, and is freed here",
    }[status.cause]
