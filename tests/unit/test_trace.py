"""The trace file: what is written is what is read, by us and by numpy; anything else is refused."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lazyproc
from lazyproc.errors import ImageError, LazyprocError
from lazyproc.events import Event, Note
from lazyproc.trace import (
    FIELDS,
    HEADER_BYTES,
    OUTCOMES,
    RECORD,
    SOURCES,
    Clock,
    Fault,
    TraceFile,
    decode,
    header,
)
from lazyproc.uffd.device import Outcome
from tests.unit.garbage import garbage

times = st.integers(0, 2**63 - 1)
words = st.integers(0, 2**64 - 1)
numbers = st.integers(0, 2**32 - 1)
faults = st.builds(
    Fault,
    *(times, times, times, times, words, words, words, numbers, numbers),
    st.sampled_from(OUTCOMES),
    st.sampled_from(SOURCES),
)
CLOCK = Clock(5, 7)


def packed(fault: Fault) -> bytes:
    *values, outcome, source = (getattr(fault, name) for name in Fault.__slots__)
    return RECORD.pack(*values, OUTCOMES.index(outcome), SOURCES.index(source))


def written(path: Path, *pieces: tuple[bytes, int]) -> Path:
    with TraceFile(path) as file:
        file.begin("5e", CLOCK)
        for records, lost in pieces:
            file.write(records, lost)
    return path


@given(st.lists(faults, max_size=5), st.lists(faults, max_size=5), words)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, one: list[Fault], two: list[Fault], lost: int
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace"
    written(path, (b"".join(map(packed, one)), 0), (b"".join(map(packed, two)), lost))
    trace = lazyproc.read_trace(path)
    assert list(trace) == one + two
    assert (len(trace), trace.session, trace.clock, trace.lost) == (len(one + two), "5e", CLOCK, lost)
    assert path.stat().st_size == HEADER_BYTES + RECORD.size * len(one + two)


@given(st.lists(faults, min_size=1, max_size=5))
def test_numpy_reads_it_in_one_call(tmp_path_factory: pytest.TempPathFactory, some: list[Fault]) -> None:
    path = written(tmp_path_factory.mktemp("trace") / "trace", (b"".join(map(packed, some)), 0))
    table = numpy.fromfile(path, list(FIELDS), offset=HEADER_BYTES)
    assert table["installed"].tolist() == [fault.installed_ns for fault in some]
    assert table["addr"].tolist() == [fault.addr for fault in some]
    assert table["source"].tolist() == [SOURCES.index(fault.source) for fault in some]


def test_the_header_says_how() -> None:
    import json

    line = header("5e", CLOCK, 3)
    fields = json.loads(line)
    assert line[-1:] == b"\n"
    assert line.count(b"\n") == 1
    assert numpy.dtype([tuple(field) for field in fields["record"]]).itemsize == RECORD.size == 72
    assert (fields["header_bytes"], fields["lost"], fields["clock"]) == (len(line), 3, "CLOCK_MONOTONIC")
    assert tuple(fields["outcomes"]) == tuple(outcome.value for outcome in Outcome)


def test_the_longest_header_fits() -> None:
    most = 2**64 - 1
    assert len(header("f" * 128, Clock(most, most), most)) == HEADER_BYTES


def test_a_record_that_is_not_whole_yet_is_not_read(tmp_path: Path) -> None:
    record = RECORD.pack(*range(9), 0, 2)
    trace = lazyproc.read_trace(written(tmp_path / "trace", (record + record[:-1], 0)))
    assert len(trace) == len(list(trace)) == 1


@given(garbage(100) | st.integers(0, HEADER_BYTES - 1).map(lambda length: header("5e", CLOCK, 0)[:length]))
def test_anything_else_is_no_trace(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="is no trace of version 1"):
        lazyproc.read_trace(path)


def test_another_version_is_no_trace(tmp_path: Path) -> None:
    path = written(tmp_path / "trace")
    path.write_bytes(path.read_bytes().replace(b'"lazyproc_trace": 1', b'"lazyproc_trace": 2'))
    with pytest.raises(ImageError, match="version 1"):
        lazyproc.read_trace(path)


@pytest.mark.parametrize(("outcome", "source"), [(4, 0), (0, 6)])
def test_codes_that_mean_nothing_are_an_error(outcome: int, source: int) -> None:
    with pytest.raises(ImageError, match="mean nothing"):
        list(decode(RECORD.pack(*range(9), outcome, source)))


# --- the file ---------------------------------------------------------------------------------------------


def test_only_its_owner_can_read_it_and_what_was_there_stays_until_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"x" * 5000)
    path.chmod(0o644)
    with TraceFile(path) as file:
        assert path.read_bytes() == b"x" * 5000
        file.begin("", CLOCK)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert len(lazyproc.read_trace(path)) == 0


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, why in (("no/such/trace", "No such file"), ("", "directory"), ("fifo", "No such device")):
        with pytest.raises(LazyprocError, match=rf"{why}.*--trace"):
            TraceFile(tmp_path / name)
    with pytest.raises(LazyprocError, match=r"/dev/null: .*not an ordinary file"):
        TraceFile("/dev/null")


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: EFBIG (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_trace_and_nothing_else(tmp_path: Path) -> None:
    told: list[Event] = []
    record = RECORD.pack(*range(9), 0, 2)
    with TraceFile(tmp_path / "trace", told.append) as file:
        file.begin("", CLOCK)
        with room_for(HEADER_BYTES + 100):
            file.write(record * 2, 0)
            file.write(record, 0)
    assert told == [Note(f"{tmp_path}/trace: the trace ends here: File too large")]
    assert len(list(lazyproc.read_trace(tmp_path / "trace"))) == 1
