"""What a restore decides before it does anything: the order of processes, where pages go, how large rings are."""

from __future__ import annotations

import dataclasses
import mmap
import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import ImageError, LazyprocError, RestoreError
from lazyproc.migrate.arrival import demand_wiped
from lazyproc.model import (
    PAGE,
    Checkpoint,
    Clocks,
    Extent,
    MemoryObject,
    Mm,
    ObjectKind,
    SigAction,
    Task,
    TaskState,
    Vma,
    VmaKind,
)
from lazyproc.restore.aio import EVENT, HEADER, requests_for
from lazyproc.restore.creation import hears_of_stops, stop_signal
from lazyproc.restore.pages import arranged
from lazyproc.restore.plan import Dismiss, Exit, Fork, JoinGroup, NewSession, StandIn, creation_steps
from lazyproc.wire.native import WIPES

BASE = 0x10000


def task(vpid: int, ppid: int, pgid: int, sid: int, state: TaskState = TaskState.ALIVE) -> Task:
    return Task(vpid, ppid, pgid, sid, state, "t")


def test_groups_and_sessions_from_outside_are_inherited() -> None:
    assert creation_steps([task(5, 0, 3, 2), task(6, 5, 3, 2)]) == (Fork(5, 0), Fork(6, 5))


def test_a_child_of_the_older_session_is_forked_before_setsid() -> None:
    steps = creation_steps([task(5, 0, 5, 5), task(6, 5, 6, 5), task(7, 5, 3, 2, TaskState.ALIVE)])
    assert steps.index(Fork(7, 5)) < steps.index(NewSession(5)) < steps.index(Fork(6, 5))


def test_a_group_without_its_leader_is_founded_by_a_stand_in() -> None:
    steps = creation_steps([task(5, 0, 5, 5), task(6, 5, 4, 5), task(7, 5, 4, 5)])
    assert steps[-5:] == (StandIn(4, 6), JoinGroup(4, 4), JoinGroup(6, 4), JoinGroup(7, 4), Dismiss(4, 6))


def test_zombies_end_last() -> None:
    zombie = Task(6, 5, 6, 5, TaskState.ZOMBIE, "z", exit_code=42 << 8)
    steps = creation_steps([task(5, 0, 5, 5), zombie, task(7, 5, 6, 5)])
    assert steps.index(JoinGroup(7, 6)) < steps.index(Exit(6, 42 << 8)) == len(steps) - 1


def test_a_process_is_stopped_again_by_its_signal_where_that_will_do() -> None:
    def stopped(pgid: int, *actions: SigAction) -> Task:
        return dataclasses.replace(task(7, 6, pgid, 5, TaskState.STOPPED), stop_signal=20, sigactions=actions)

    def chosen(it: Task, *others: Task) -> int:
        return stop_signal(it, [*others, it])

    shell, job = task(5, 0, 5, 5), task(6, 5, 6, 5)
    assert chosen(stopped(6), shell, job) == 20  # the shell watches the job's group
    assert chosen(stopped(6, SigAction(20, 0, 0, 0, 0)), shell, job) == 20
    assert chosen(stopped(6, SigAction(20, 0x1000, 0, 0, 0)), shell, job) == signal.SIGSTOP
    assert (
        chosen(stopped(5), shell, task(6, 5, 5, 5)) == signal.SIGSTOP
    )  # nobody does: the kernel would drop it


def test_a_parent_hears_of_a_stop_unless_it_said_not_to() -> None:
    def hears(handler: int, flags: int = 0) -> bool:
        actions = (SigAction(signal.SIGCHLD, handler, flags, 0, 0), SigAction(signal.SIGSEGV, 1, 1, 0, 0))
        return hears_of_stops(dataclasses.replace(task(5, 0, 5, 5), sigactions=actions))

    pending = (signal.SIGCHLD.to_bytes(4, "little").ljust(128, b"\0"),)
    assert hears_of_stops(task(5, 0, 5, 5))
    assert hears(0x1000)
    assert not hears(1)
    assert not hears(0x1000, 1)
    assert not hears_of_stops(dataclasses.replace(task(5, 0, 5, 5), pending=pending))


def test_a_session_whose_leader_is_gone_is_refused() -> None:
    with pytest.raises(RestoreError, match="session 3"):
        creation_steps([task(5, 0, 5, 5), task(6, 5, 6, 4), task(7, 6, 7, 3)])


def checkpoint(lengths: list[tuple[int, VmaKind]], extents: tuple[Extent, ...]) -> Checkpoint:
    """One task with adjacent mappings of these lengths in pages, from BASE on."""
    vmas, at = [], BASE
    for length, kind in lengths:
        vmas.append(Vma(at, at + length * PAGE, 3, mmap.MAP_PRIVATE, kind))
        at += length * PAGE
    fields: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Mm)), 0)
    mm = Mm(**{**fields, "vmas": tuple(vmas)})
    root = Task(1, 0, 1, 1, TaskState.ALIVE, "t", mm=mm)
    memory = {MemoryObject(ObjectKind.TASK, 1): extents}
    return Checkpoint((root,), {}, {}, {}, {}, memory, Clocks(0, 0, 0))


MAPPINGS = st.lists(
    st.tuples(st.integers(1, 5), st.sampled_from([VmaKind.ANON, VmaKind.FILE])), min_size=1, max_size=6
)


@given(MAPPINGS, st.booleans(), st.booleans())
def test_extents_end_with_their_mapping_and_no_page_is_lost(
    lengths: list[tuple[int, VmaKind]], marked: bool, lazy: bool
) -> None:
    count = sum(length for length, _ in lengths)
    before = checkpoint(lengths, (Extent(BASE, count, lazy=marked),))
    ((_, after),) = arranged(before, lazy=lazy).memory.items()
    assert before.root.mm is not None
    assert [(e.addr, e.end) for e in after] == [(v.start, v.end) for v in before.root.mm.vmas]
    assert [e.lazy for e in after] == [marked and lazy and kind is VmaKind.ANON for _, kind in lengths]


@pytest.mark.parametrize("flag", ["lo", "wf"])
def test_what_is_locked_or_wiped_by_a_fork_is_not_lazy(flag: str) -> None:
    before = checkpoint([(2, VmaKind.ANON)], (Extent(BASE, 2, lazy=True),))
    mm = before.root.mm
    assert mm is not None
    vmas = tuple(dataclasses.replace(vma, vm_flags=frozenset({"rd", "wr", flag})) for vma in mm.vmas)
    root = dataclasses.replace(before.root, mm=dataclasses.replace(mm, vmas=vmas))
    ((_, after),) = arranged(dataclasses.replace(before, tasks=(root,)), lazy=True).memory.items()
    assert list(after) == [Extent(BASE, 2, lazy=False)]


def test_a_source_that_brings_too_late_what_a_fork_wipes_is_refused() -> None:
    wiped = Vma(BASE, BASE + PAGE, 3, mmap.MAP_PRIVATE, VmaKind.ANON, vm_flags=frozenset({"wf"}))
    before = checkpoint([(1, VmaKind.ANON)], ())
    mm = before.root.mm
    assert mm is not None
    demand_wiped(before, 0)
    root = dataclasses.replace(before.root, mm=dataclasses.replace(mm, vmas=(wiped,)))
    before = dataclasses.replace(before, tasks=(root,))
    demand_wiped(before, WIPES)
    with pytest.raises(LazyprocError, match=f"pid 1: a fork wipes the memory at {BASE:#x}"):
        demand_wiped(before, WIPES - 1)


@pytest.mark.parametrize("addr", [BASE - PAGE, BASE + PAGE])
def test_a_page_in_no_mapping_is_an_error(addr: int) -> None:
    with pytest.raises(ImageError, match="in no mapping"):
        arranged(checkpoint([(1, VmaKind.ANON)], (Extent(addr, 1, lazy=True),)), lazy=True)


@given(st.integers(1, 10_000), st.integers(1, 512))
def test_a_ring_of_the_same_length_is_asked_for(requests: int, cpus: int) -> None:
    """fs/aio.c: at least four requests for each processor, doubled, plus two, in whole pages."""
    events = 2 * max(requests, 4 * cpus) + 2
    length = -(-(HEADER + EVENT * events) // PAGE) * PAGE
    asked = requests_for(length, cpus)
    assert -(-(HEADER + EVENT * (2 * max(asked, 4 * cpus) + 2)) // PAGE) * PAGE == length


def test_a_host_whose_rings_are_all_larger_is_refused() -> None:
    with pytest.raises(RestoreError, match="processors"):
        requests_for(PAGE, 64)
