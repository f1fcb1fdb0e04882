"""The pager: puts pages where they are missing, on demand and in bulk.

Python fills its tables and reads its counters; the work is done by two C threads (_pager.h) that never take the GIL.
"""

from __future__ import annotations

import enum
import errno
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import TracebackType
from typing import Any, Self

from lazyproc.errors import HostLacks, LazyprocError, Parked, UsageError
from lazyproc.events import PagesMoved
from lazyproc.facts import dataclass
from lazyproc.model import Extent, MemoryObject, ObjectKind
from lazyproc.runs import Extents, Segment, Segments, interleaved
from lazyproc.uffd._pager import ffi, lib
from lazyproc.uffd.device import Outcome
from lazyproc.uffd.policy import Chunk, Page

SLICE = 0.25  # seconds between two looks at Python's own signals while waiting


class PagerState(enum.IntEnum):
    """As in the C core's `enum pager_status`."""

    IDLE = 0
    RUNNING = 1
    DONE = 2  # the map is known and every page has come, was discarded, or is zero
    LOST = 3  # the source is gone or talked garbage; who touches a missing page waits. `reconnect` goes on
    FAILED = 4  # the kernel refused something: waits as well, and another pager has to take over
    STOPPED = 5


@dataclass(frozen=True, slots=True)
class FaultTimes:
    """How long faults waited, from the message's arrival to the wake, in microseconds."""

    count: int
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Counters:
    """A reading of the pager's counters, in pages unless named otherwise.

    Each page counts once: at the end `total == zero + eager + urgent + bulk + dropped + poisoned`. `remaining` are the
    pages that still wait, those of forked children included, `packed` those that came compressed.
    `outcomes[class][outcome]` counts what the kernel said.
    """

    total: int
    zero: int
    eager: int
    urgent: int
    bulk: int
    dropped: int
    poisoned: int
    remaining: int
    outcomes: Mapping[str, Mapping[Outcome, int]]
    bytes_in: int
    bytes_out: int
    packed: int
    reconnects: int
    fault_us: FaultTimes

    @property
    def settled(self) -> int:
        """Pages of the map that have come to their end."""
        return self.zero + self.eager + self.urgent + self.bulk + self.dropped + self.poisoned

    def pages(self) -> dict[str, Any]:
        """Where each came from, by the names that reports have for it."""
        names = ("total", "zero", "eager", "urgent", "bulk", "packed", "dropped", "poisoned")
        return {f"pages_{name}": getattr(self, name) for name in names}

    def as_event(self) -> PagesMoved:
        return PagesMoved(
            total=self.total,
            installed=self.eager + self.urgent + self.bulk,
            zero=self.zero,
            urgent=self.urgent,
            bulk=self.bulk,
            dropped=self.dropped,
        )


_OUTCOMES = tuple(Outcome)
TRACE_PIECE = 4096  # records
ACK_PIECE = 4096  # runs
_SHORT_OF = {errno.ENOMEM: "RLIMIT_AS", errno.EFBIG: "RLIMIT_FSIZE"}
FAULTED = 1024  # as the core keeps


def bucket_floor(index: int) -> int:
    """The shortest time in ns that falls into bucket `index` of the core's histogram: 16 buckets to the octave."""
    if index < 16:
        return index
    octave, part = divmod(index, 16)
    return (16 + part) << (octave - 1)


def percentile(buckets: Sequence[int], fraction: float) -> float:
    """The time in ns, in the middle of its bucket, that `fraction` of the counted faults did not exceed."""
    rank = fraction * sum(buckets)
    seen = 0
    for index, count in enumerate(buckets):
        seen += count
        if count and seen >= rank:
            return (bucket_floor(index) + bucket_floor(index + 1)) / 2
    return 0.0


def _fault_times(raw: Any) -> FaultTimes:
    buckets = list(raw.fault_ns)
    worst = raw.fault_max_ns / 1000
    p50, p90, p99 = (min(percentile(buckets, fraction) / 1000, worst) for fraction in (0.50, 0.90, 0.99))
    return FaultTimes(int(raw.faults), p50, p90, p99, worst)


def _check(result: int, what: str) -> int:
    if result < 0:
        raise LazyprocError(f"{what}: {os.strerror(-result)}", where="pager")
    return result


def _table(kind: str, rows: array[int]) -> tuple[Any, int]:
    """Rows as an array of C structures that consist of u64, and how many there are."""
    table = ffi.from_buffer(f"struct {kind}[]", rows)
    return table, len(table)


def demand_tables() -> None:
    """Raises HostLacks when no pager can be made here."""
    Pager().abandon()


def register_regions(uffd: int, rows: array[int]) -> None:
    """UFFDIO_REGISTER of what `Pager.add_regions` is told of, for missing pages. Raises OSError."""
    result = lib.pager_register(uffd, *_table("pager_region", rows))
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def _rows(chunks: Iterable[Chunk]) -> array[int]:
    return array("Q", (number for obj, addr, pages in chunks for number in (obj.key, addr, pages)))


@cache
def _object(key: int) -> MemoryObject:
    return MemoryObject(ObjectKind(key & 0xFF), key >> 8)


def rebind(ledger: int, cradle: int, userfaultfds: Sequence[int]) -> None:
    """Give a ledger, whose pagers are gone with their descriptor table, the userfaultfds of its processes anew, in the
    order in which they were added (-1: that process has ended), and those of forked children, which the cradle has.
    Before a Pager takes it over.
    """
    fds = ffi.new("int[]", list(userfaultfds))
    _check(lib.pager_rebind(ledger, cradle, fds, len(userfaultfds)), "ledger")


def demand_removals() -> None:
    """Raises OSError when MADV_REMOVE of shared memory cannot be watched (CONFIG_FTRACE_SYSCALLS, CAP_PERFMON)."""
    pager = Pager()
    try:
        pager.watch_removals()
    finally:
        pager.abandon()


def demand_zstd() -> None:
    """Raises OSError (ENOENT) when there is no libzstd to compress pages with."""
    if not lib.pager_has_zstd():
        raise OSError(errno.ENOENT, "there is no libzstd.so.1")


def remaining(ledger: int) -> int:
    """How many pages still wait, by a ledger that is open for reading."""
    return _check(int(lib.pager_remaining(ledger)), "ledger")


class Pager:
    """Serves the missing pages of one or more processes. A context manager that stops the threads.

    Order of use: add_space and add_region for memory that is registered already, serve_segments and/or serve_remote,
    start; plan and apply_map before or after it; wait; finish. Leaving the context before `finish` leaves the
    userfaultfds open (`spaces` names them), so that nobody reads a page that never came.

    `ledger` is the descriptor of another pager's ledger: this one goes on where that one, which must have ended,
    stopped. Both must share one descriptor table, the userfaultfds being known by their numbers.
    Raises HostLacks without SSE4.2 and PCLMUL, and where limits leave no room for the tables.
    """

    def __init__(self, *, trace: bool = False, ledger: int | None = None) -> None:
        out = ffi.new("struct pager **")
        result = lib.pager_new(-1 if ledger is None else ledger, trace, out)
        if result == -errno.ENOTSUP:
            raise HostLacks(
                "the page protocol's checksums need SSE4.2 and PCLMUL", remedy="use an x86-64-v2 host"
            )
        if short := _SHORT_OF.get(-result):
            raise HostLacks(
                f"{short} leaves no room for its tables, hundreds of GiB that are nearly empty",
                where="pager",
                remedy="make it unlimited for who restores or receives (ulimit, or Limit...=infinity of a service)",
            )
        _check(result, "cannot make a pager")
        self._pager: Any = ffi.gc(out[0], lib.pager_free)
        self.bulk = False  # it brings what nobody waits for
        self._next, self._lost = ffi.new("uint64_t *"), ffi.new("uint64_t *")  # records of the trace
        self._seen = ffi.new("uint64_t *")  # faults
        self._faulted = ffi.new("struct pager_page[]", FAULTED)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- tables ---

    def add_space(self, uffd: int, vpid: int = 0, pid: int = 0) -> int:
        """A process, by its userfaultfd (API done, ranges registered); returns its number.

        `vpid` is for the trace; 0: not known, then the tid of its first fault is taken for it.
        `pid` is the same process in our own namespace, 0: not known.
        The descriptor belongs to the pager from now on. It is closed when the process turns out to be gone.
        """
        return _check(lib.pager_add_space(self._pager, uffd, vpid, pid), f"userfaultfd {uffd}")

    def add_region(self, space: int, start: int, length: int, obj: MemoryObject, obj_addr: int) -> None:
        """`length` bytes from `start` of a process show `obj` from `obj_addr` on. Whole pages."""
        where = f"region {start:#x}+{length:#x}"
        _check(lib.pager_add_region(self._pager, space, start, length, obj.key, obj_addr), where)

    def add_regions(self, space: int, rows: array[int]) -> None:
        """Several at once: start, length, MemoryObject.key, address in the object; see `register_regions`."""
        table = _table("pager_region", rows)
        _check(lib.pager_add_regions(self._pager, space, *table), f"regions of space {space}")

    def add_eager(self, pages: int) -> None:
        """These were copied before the process ran: counted as total and as eager."""
        lib.pager_add_eager(self._pager, pages)

    def mark_installed(self, obj: MemoryObject, addr: int, count: int) -> None:
        """Pages of a region that are there already. Not counted (that is add_eager's), also when the map names them.

        Call it before `start`.
        """
        _check(lib.pager_mark_installed(self._pager, obj.key, addr, count), f"{obj} at {addr:#x}")

    def watch_removals(self) -> None:
        """Tell MADV_REMOVE of shared memory, after which it is zero, from MADV_DONTNEED, after which what has not come
        yet still comes. Before the processes run; holds for every later pager of the ledger.

        Raises OSError when the kernel does not let us: both are taken for DONTNEED then.
        """
        result = lib.pager_watch_removals(self._pager)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def note_removal(self, pid: int, tid: int, start: int, length: int) -> None:
        """This thread is in madvise(MADV_REMOVE), called when nobody watched. Before `start`."""
        _check(lib.pager_note_removal(self._pager, pid, tid, start, length), f"tid {tid}")

    def serve_segments(self, segments: Iterable[Segment]) -> None:
        """Pages that lie in local files. Once, before `start`; the descriptors stay the caller's.

        Raises UsageError when segments overlap or a file is shorter than they say.
        """
        result = lib.pager_set_segments(self._pager, *_table("pager_segment", Segments.of(segments).rows))
        if result < 0:
            raise UsageError(f"the segments cannot be served: {os.strerror(-result)}", where="pager")

    def serve_remote(self, urgent: int, bulk: int, *, packs: bool = False) -> None:
        """Two connected stream sockets to a page server, which belong to the pager from now on. One that `packs` is
        asked for compressed pages in bulk where these come faster, and where there is a libzstd here.

        Also after the source was lost: everything that was under way is asked for again.
        """
        lib.pager_set_remote(self._pager, urgent, bulk, packs)

    def plan(self, chunks: Iterable[Chunk]) -> None:
        """The order of the bulk transfer, from now on; what it leaves out comes last."""
        _check(lib.pager_set_plan(self._pager, *_table("pager_run", _rows(chunks))), "plan")

    def bring_ahead(self, chunks: Iterable[Chunk]) -> None:
        """These before the plan, in place of what was to come before it until now; once the map is known. They may name
        what is there already and what is in no region."""
        _check(lib.pager_set_ahead(self._pager, *_table("pager_run", _rows(chunks))), "plan")

    def faulted(self, timeout: float) -> Sequence[Page] | None:
        """The pages with content, or not known to have none, that were waited for since the last call: the latest 1024,
        in their order. Waits for one at most `timeout` seconds. None: no more will come. One thread at a time.
        """
        count = lib.pager_faulted(
            self._pager, self._seen, self._faulted, FAULTED, max(0, int(timeout * 1000))
        )
        if count < 0:
            return None
        rows = ffi.unpack(ffi.cast("uint64_t *", self._faulted), 2 * count) if count else []
        return [Page(_object(key), addr) for key, addr in zip(rows[::2], rows[1::2], strict=True)]

    def wait_plan(self, timeout: float) -> bool:
        """Whether all that the plan names is there, before the map is applied; False after `timeout` seconds, or when
        no more comes.
        """
        return bool(lib.pager_wait_plan(self._pager, max(0, int(timeout * 1000))) == 0)

    def apply_map(self, extents: Mapping[MemoryObject, Sequence[Extent]]) -> None:
        """Which lazy pages have content; all others are zero. Once, before or after `start`.

        Extents that are not lazy, or lie in no region, are not the pager's and not counted.
        """
        rows = array("Q")
        for obj, runs in extents.items():
            lazy = Extents.of(runs).where(lazy=True)
            rows += interleaved(array("Q", [obj.key]) * len(lazy), lazy.addrs, lazy.counts)
        lib.pager_apply_map(self._pager, *_table("pager_run", rows))

    @property
    def map_known(self) -> bool:
        """Whether `apply_map` was called, for this pager or an earlier one of its ledger."""
        return bool(lib.pager_map_known(self._pager))

    def acknowledge(self) -> Iterator[tuple[int, int, int]]:
        """(MemoryObject.key, address, pages) of lazy pages that have come, or are wanted no more, in every process, and
        were not named since `forget_acknowledged`: the source may free them. One thread at a time.
        """
        runs = ffi.new("struct pager_run[]", ACK_PIECE)
        for run in runs[0 : lib.pager_acknowledge(self._pager, runs, ACK_PIECE)]:
            yield int(run.object), int(run.addr), int(run.count)

    def forget_acknowledged(self) -> None:
        """Another link: what was acknowledged is named once more."""
        lib.pager_forget_acked(self._pager)

    def alone(self, *, poison: bool = False) -> None:
        """No connection is expected, and a map that has not come will not: every page may have content.

        With `poison` what no segment brings is lost: who touches such a page gets SIGBUS (UFFDIO_POISON, Linux 6.6).
        Otherwise it waits, the others come, and the state is LOST. Before `start`.
        """
        lib.pager_alone(self._pager, poison)

    @property
    def shares_poison(self) -> bool:
        """Whether some of what was lost lies in shared memory. The mark is in page tables, so mappings that are made
        later (fork, mremap) have it only from us: do not `finish` before the last process has ended.
        """
        return bool(lib.pager_shares_poison(self._pager))

    # --- running ---

    def start(self, bulk: bool = True, max_rate: int = 0) -> None:
        """Starts the threads. `bulk=False` fetches only what is touched; `max_rate` bytes a second, 0 without limit."""
        self.bulk = bulk
        _check(lib.pager_start(self._pager, bulk, max_rate), "start")

    def start_bulk(self, *, wakes: bool = False) -> None:
        """What was started without `bulk` brings what nobody waits for as well, from now on; when the process `wakes`,
        that has just been let run, once it has waited for its first pages (_pace.h).
        """
        self.bulk = True
        _check(lib.pager_start_bulk(self._pager, wakes), "start")

    @property
    def news(self) -> int:
        """A descriptor that is readable while the state is DONE, LOST or FAILED."""
        return int(lib.pager_news(self._pager))

    def wait(self, timeout: float | None = None) -> bool:
        """True when every page is there; False after `timeout` seconds, or at once when the source is lost.

        Raises Parked when the pager failed: the memory stays as it is, whoever touches a missing page waits.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = SLICE if end is None else min(SLICE, end - time.monotonic())
            state = lib.pager_wait(self._pager, max(0, int(left * 1000) + 1))
            if state == PagerState.FAILED:
                raise Parked(self.reason, where="pager", remedy="take its ledger over with another pager")
            if state >= 0:
                return bool(state == PagerState.DONE)
            if end is not None and time.monotonic() >= end:
                return False

    @property
    def state(self) -> PagerState:
        return PagerState(lib.pager_status(self._pager, ffi.NULL, 0))

    @property
    def reason(self) -> str:
        """Why the state is LOST or FAILED, else empty."""
        text = ffi.new("char[]", 200)
        lib.pager_status(self._pager, text, 200)
        return bytes(ffi.string(text)).decode()

    def counters(self) -> Counters:
        raw = ffi.new("struct pager_counters *")
        lib.pager_counters(self._pager, raw)
        return Counters(
            total=int(raw.total),
            zero=int(raw.zero),
            eager=int(raw.eager),
            urgent=int(raw.urgent),
            bulk=int(raw.bulk),
            dropped=int(raw.dropped),
            poisoned=int(raw.poisoned),
            remaining=int(raw.remaining),
            outcomes={
                name: dict(zip(_OUTCOMES, (int(n) for n in row), strict=True))
                for name, row in zip(("zero", "urgent", "bulk"), raw.outcomes, strict=True)
            },
            bytes_in=int(raw.bytes_in),
            bytes_out=int(raw.bytes_out),
            packed=int(raw.packed),
            reconnects=int(raw.reconnects),
            fault_us=_fault_times(raw),
        )

    def trace(self, end: int | None = None) -> Iterator[tuple[bytes, int]]:
        """The faults since the last call, in pieces: records as docs/trace.md has them, and how many were lost so far.

        The oldest are lost when more than 65535 came in between. With `end` nothing behind the pager's first `end`
        faults. One thread at a time.
        """
        rows = ffi.new("struct pager_fault[]", TRACE_PIECE)
        seen = -1
        while seen != self._next[0]:
            seen = int(self._next[0])
            wanted = TRACE_PIECE if end is None else max(0, min(TRACE_PIECE, end - seen))
            count = lib.pager_trace(self._pager, self._next, self._lost, rows, wanted)
            if seen != self._next[0]:
                yield bytes(ffi.buffer(rows, count * ffi.sizeof("struct pager_fault"))), int(self._lost[0])

    @property
    def ledger(self) -> int:
        """The descriptor of the memfd with all tables, for a guard to keep."""
        return int(lib.pager_ledger_fd(self._pager))

    @property
    def cradle(self) -> int:
        """The descriptor of a socket that keeps the userfaultfds of forked children (_cradle.h). Every process has to
        hold it before it runs.
        """
        return int(lib.pager_cradle(self._pager))

    # --- the end ---

    def stop(self) -> None:
        """Ends the threads. The userfaultfds stay open."""
        lib.pager_stop(self._pager)

    def abandon(self) -> None:
        """Ends the threads and closes all descriptors. Whoever touches a missing page then reads zeros: only for
        processes that are gone, or know it.
        """
        lib.pager_abandon(self._pager)

    def spaces(self) -> tuple[int, ...]:
        """The userfaultfds of the processes that live, forked children included."""
        fds = ffi.new("int[]", 8192)
        return tuple(fds[0 : lib.pager_spaces(self._pager, fds, 8192)])

    def release(self) -> None:
        """DONE: ends all registrations, so that later faults are the kernel's own. The threads go on.

        Memory that grew while it was registered (a stack, mremap) is unknown here and stays registered until the
        last descriptor of its userfaultfd is closed: close duplicates that others hold (a guard, the process itself)
        between this and `finish`. Raises UsageError when pages are missing, Parked when a process is stopped in the
        middle of a change of its mappings.
        """
        result = lib.pager_release(self._pager)
        if result == -errno.EBUSY:
            raise UsageError("pages are still missing", where="pager", remedy="wait for the state DONE first")
        if result == -errno.ETIMEDOUT:
            raise Parked(
                "a process is stopped while its mappings change", remedy="let it go on, then try again"
            )
        _check(result, "cannot release the memory (vm.max_map_count?)")

    def finish(self, collapse: Iterable[tuple[int, int, int]] = ()) -> int:
        """`release`, then stops and closes the userfaultfds. Raises what `release` raises.

        `collapse` names (pidfd, start, length) that had huge pages at the source; returns how many of them have huge
        pages again (MADV_COLLAPSE, Linux 6.1).
        """
        self.release()
        _check(lib.pager_finish(self._pager), "cannot finish")
        return sum(lib.pager_collapse(pidfd, start, length) == 0 for pidfd, start, length in collapse)
