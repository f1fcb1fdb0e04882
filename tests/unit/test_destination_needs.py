"""What a tree needs of another host: what fits, how it travels, and that no list grows beyond its frame."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import Obstacle, ProtocolError, RestoreError
from lazyproc.host_check import Finding, State
from lazyproc.kernel import cpu
from lazyproc.kernel.sysvipc import Segment
from lazyproc.kernel.xfeatures import ON_REQUEST
from lazyproc.migrate.about import About, about_in, fit, host_frame
from lazyproc.migrate.needs import KINDS, needs_frame, needs_in, obstacles_frame, obstacles_in
from lazyproc.migrate.prepare import Offer, objections, vdso_build_id
from lazyproc.migrate.room import Room
from lazyproc.model import RegularFile
from lazyproc.needs import FileNeed, PathNeed, SegmentNeed, Wanted, file_need
from lazyproc.restore.files import FoundFile, objection
from lazyproc.restore.needs import unmet
from lazyproc.restore.objects import SLOTS, check_segment
from lazyproc.restore.tree import Pidns
from lazyproc.wire import jsonobject
from lazyproc.wire.frame import MAX_NEEDS
from lazyproc.wire.native import Host, Needs, Obstacles

numbers = st.integers(-1, 2**63)
paths = st.binary(min_size=1, max_size=60).map(os.fsdecode)  # a path is any bytes
options = st.lists(st.tuples(numbers, numbers, st.binary(max_size=8)), max_size=3).map(tuple)
BY_TYPE = {"str": paths, "int": numbers, "bytes": st.binary(max_size=24), "Options": options}
needs = st.one_of(
    *(
        st.builds(cls, **{name: BY_TYPE[str(field.type)] for name, field in cls.__dataclass_fields__.items()})
        for cls in KINDS.values()
    )
)
wanted = st.builds(Wanted, needs, st.integers(1, 2**22), paths)


def arrived(frame: Needs) -> Needs:
    """As the other end gets it."""
    return Needs(jsonobject.decode(jsonobject.encode(frame.fields)))


# --- how it travels -----------------------------------------------------------------------------------------


@given(st.lists(wanted, max_size=6))
def test_every_need_arrives_as_it_was(every: list[Wanted]) -> None:
    frame, left_out = needs_frame(every)
    assert left_out == 0
    assert needs_in(arrived(frame)) == tuple(every)


@given(st.lists(wanted, min_size=1, max_size=3), st.data())
def test_a_need_that_is_none_is_a_protocol_error(every: list[Wanted], data: st.DataObject) -> None:
    frame = arrived(needs_frame(every)[0])
    rows = frame.fields["needs"]
    assert isinstance(rows, list)
    row = data.draw(st.sampled_from(rows))
    assert isinstance(row, dict)
    name = data.draw(st.sampled_from(sorted(set(row) - {"kind"})))
    rubbish: list[jsonobject.JsonValue] = [None, True, 1.5, {}, [[1]], [[1, 2, "x"]]]
    row[name] = data.draw(st.sampled_from(rubbish))
    with pytest.raises(ProtocolError):
        needs_in(frame)


def test_a_kind_that_is_not_known_yet_is_passed_over() -> None:
    frame, _ = needs_frame([Wanted(PathNeed("/a"), 1, "fd 3")])
    rows = frame.fields["needs"]
    assert isinstance(rows, list)
    rows.append({"kind": "moonlight"})
    assert [each.need for each in needs_in(frame)] == [PathNeed("/a")]


@pytest.mark.parametrize("fields", [{}, {"needs": None}, {"needs": [1]}])
def test_what_is_no_list_of_needs(fields: dict[str, jsonobject.JsonValue]) -> None:
    with pytest.raises(ProtocolError):
        needs_in(Needs(fields))


def test_more_needs_than_a_frame_holds_are_counted() -> None:
    every = [Wanted(PathNeed(f"/{number}" + "é" * 1000), 1, "fd 3") for number in range(1000)]
    frame, left_out = needs_frame(every)
    assert len(jsonobject.encode(frame.fields)) <= MAX_NEEDS
    kept = needs_in(frame)
    assert kept == tuple(every[: len(kept)])
    assert len(kept) + left_out == 1000
    assert 0 < left_out < 1000


@given(st.lists(st.builds(Obstacle, st.integers(0, 2**22), paths, paths, paths), min_size=1, max_size=5))
def test_obstacles_arrive_with_who_said_so(every: list[Obstacle]) -> None:
    found = obstacles_in(obstacles_frame(every), "host:1")
    assert found == tuple(replace(each, why=f"host:1: {each.why}") for each in every)


def test_more_obstacles_than_a_frame_holds_are_counted() -> None:
    frame = obstacles_frame([Obstacle(1, "fd 3", "x" * 10_000, "y")] * 1000)
    assert len(jsonobject.encode(frame.fields)) <= MAX_NEEDS
    *listed, last = obstacles_in(frame, "host:1")
    assert last.why == f"host:1: {1000 - len(listed)} more"
    assert last.remedy


@pytest.mark.parametrize("fields", [{}, {"obstacles": [{}]}, {"obstacles": [{"pid": "1"}]}])
def test_what_are_no_obstacles(fields: dict[str, jsonobject.JsonValue]) -> None:
    with pytest.raises(ProtocolError):
        obstacles_in(Obstacles(fields), "host:1")


def test_a_refusal_without_a_reason_is_one_all_the_same() -> None:
    assert obstacles_in(Obstacles({"obstacles": []}), "host:1") != ()


# --- what fits ----------------------------------------------------------------------------------------------

REGULAR, DIRECTORY, DEVICE = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFCHR | 0o666


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.binary(max_size=20), st.integers(0, 0o7777))
def test_the_size_of_a_file_counts_where_it_is_mapped_private(
    here: int, there: int, build_id: bytes, permissions: int
) -> None:
    """A log may be longer on one host; permissions are the kernel's to judge."""
    file = RegularFile("/f", REGULAR, here, build_id=build_id)
    found = FoundFile(stat.S_IFREG | permissions, 0, there, build_id)
    assert objection(file_need(file, 0, sized=False), found) is None
    against = objection(file_need(file, 0, sized=True), found)
    assert (against is None) == (here == there)


@given(st.binary(max_size=4), st.binary(max_size=4))
def test_another_build_is_said_when_one_is_wanted(want: bytes, have: bytes) -> None:
    against = objection(FileNeed("/f", REGULAR, 0, build_id=want), FoundFile(REGULAR, 0, 5, have))
    assert (against is None) == (want in (b"", have))
    assert against is None or want.hex() in against[0]


@pytest.mark.parametrize(
    ("need", "found", "fits"),
    [
        (FileNeed("/f", REGULAR, 0), FoundFile(DIRECTORY, 0, 0, b""), False),
        (FileNeed("/f", DIRECTORY, 0), FoundFile(DIRECTORY, 0, 4096, b""), True),
        (FileNeed("/f", DEVICE, 2, rdev=0x103), FoundFile(DEVICE, 0x103, 0, b""), True),
        (FileNeed("/f", DEVICE, 2, rdev=0x103), FoundFile(DEVICE, 0x105, 0, b""), False),
        (FileNeed("/f", REGULAR, 0, rdev=0x103), FoundFile(REGULAR, 0, 0, b""), True),
        (FileNeed("/f", REGULAR, 0, size=0), FoundFile(REGULAR, 0, 1, b""), False),
    ],
)
def test_kinds_of_files(need: FileNeed, found: FoundFile, fits: bool) -> None:
    assert (objection(need, found) is None) is fits


segments = st.builds(
    Segment, st.integers(0, 3), st.integers(0, 3 * SLOTS), st.just(0o600), st.just(0), st.just(0), st.just(1)
)


@given(st.builds(SegmentNeed, st.integers(0, 3), st.integers(0, 3 * SLOTS)), st.lists(segments, max_size=3))
def test_a_segment_needs_its_key_and_its_slot(need: SegmentNeed, here: list[Segment]) -> None:
    """Key 0 is IPC_PRIVATE: anybody may have it."""
    taken = any(s.key == need.key != 0 or s.id % SLOTS == need.id % SLOTS for s in here)
    try:
        check_segment(need, here)
    except RestoreError:
        assert taken
    else:
        assert not taken


@given(st.lists(wanted, max_size=3), st.sampled_from(["auto", "host", "new"]))
def test_whatever_is_asked_for_there_is_an_answer(every: list[Wanted], pidns: Pidns) -> None:
    for each, error in unmet(every, pidns=pidns):
        assert each in every
        assert error.what


# --- two hosts ----------------------------------------------------------------------------------------------

HERE = About("6.18", {"1.0.ecx": 0b1011, "7.0.ebx": 5}, "aa", ())


def states(source: About, destination: About) -> dict[str, State]:
    return {finding.name: finding.state for finding in fit(source, destination)}


@given(
    st.dictionaries(st.sampled_from(["1.0.ecx", "7.0.ebx"]), st.integers(0, 15)),
    st.sampled_from(["aa", "bb"]),
)
def test_a_destination_may_have_more_but_not_less(words: dict[str, int], vdso: str) -> None:
    there = replace(HERE, cpu=words, vdso=vdso)
    found = states(HERE, there)
    has_all = all(bits & ~words.get(name, 0) == 0 for name, bits in HERE.cpu.items())
    assert (found["peer: processor"] is State.OK) == has_all
    assert (found["peer: vdso"] is State.OK) == (vdso == "aa")
    assert all(finding.remedy for finding in fit(HERE, there) if finding.state is not State.OK)


def test_the_vector_state_that_a_destination_lacks_is_said_before_the_freeze() -> None:
    here = cpu.features()
    wanted = here | {"d.0.eax": here["d.0.eax"] | 1 << 31}
    vdso = vdso_build_id().hex()
    assert list(objections(Offer(1, 1, 0, here, vdso), Room(1 << 40))) == []
    (obstacle,) = objections(Offer(1, 1, 0, wanted, vdso), Room(1 << 40))
    assert obstacle.why == "its processor lacks features the process may use (d.0.eax 0x80000000)"


def test_tiles_are_a_feature_where_the_kernel_gives_them() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert bool(cpu.features()["d.0.eax"] & ON_REQUEST) == ("amx_tile" in flags)


def test_what_the_destination_found_of_itself_is_passed_on() -> None:
    rows = (Finding("time namespaces", State.MISSING, "not here", "another kernel"),)
    assert states(HERE, replace(HERE, findings=rows))["peer: time namespaces"] is State.MISSING


def test_this_host_tells_what_it_is() -> None:
    frame = host_frame()
    there = about_in(Host(jsonobject.decode(jsonobject.encode(frame.fields))))
    assert there.findings
    assert all(state is State.OK for name, state in states(there, there).items() if "processor" in name)


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": []},
        {"vdso": None},
        {"kernel": 6},
        {"findings": {}},
        {"findings": [{}]},
        {"findings": [{"name": "a", "state": "fine", "detail": "", "remedy": ""}]},
    ],
)
def test_what_is_no_host(change: dict[str, jsonobject.JsonValue]) -> None:
    fields: dict[str, jsonobject.JsonValue] = {"kernel": "6", "cpu": {}, "vdso": "", "findings": []}
    about_in(Host(fields))
    with pytest.raises(ProtocolError):
        about_in(Host(fields | change))
