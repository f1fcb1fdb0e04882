"""The decisions of explain, on facts that need no process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.dump.copies import bytes_of_copies
from lazyproc.dump.explain import BORROWED, notes, obstacles, too_much_private
from lazyproc.dump.supervisor import Supervisor, unit_in
from lazyproc.dump.survey import ProcessFacts, Sharing, ThreadFacts, TreeFacts
from lazyproc.kernel import proc
from lazyproc.kernel.sysvipc import LastUse

NOBODY = Supervisor("", None)
NAMESPACES = {
    name: 100 + at for at, name in enumerate(("mnt", "net", "ipc", "uts", "user", "pid", "cgroup", "time"))
}
NAMESPACES |= {f"{name}_for_children": NAMESPACES[name] for name in ("pid", "time")}
VDSO = proc.SmapsEntry(
    proc.MapsEntry(0x7000, 0x8000, "r-xp", 0, (0, 0), 0, "[vdso]", False),
    4096,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    frozenset(),
)
STAT = replace(
    proc.stat((Path(__file__).parent / "proc/stat").read_bytes()), state="S", tty=0, policy=0, flags=0
)


def process(pid: int, **changes: object) -> ProcessFacts:
    stat = replace(STAT, pid=pid, pgrp=10, session=10, num_threads=1)
    plain = ProcessFacts(
        stat=stat,
        vpid=pid,
        kernel_thread=False,
        locked_kib=0,
        smaps=(VDSO,),
        threads=(ThreadFacts(pid, pid, tracer=0, namespaces=NAMESPACES, apart=()),),
        namespaces=NAMESPACES,
        elf_class=2,
        limits=((proc.RLIM_INFINITY,) * 2,) * 16,
        timers=0,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def tree(*processes: ProcessFacts, **changes: object) -> TreeFacts:
    plain = TreeFacts(
        processes, our_pid=1, our_namespaces=NAMESPACES, sharing=(), ipc_uses=(), supervisor=NOBODY, stuck={}
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@given(st.integers(1, 20))
def test_an_ordinary_tree_has_neither_obstacles_nor_notes(count: int) -> None:
    facts = tree(*(process(10 + at) for at in range(count)))
    assert list(obstacles(facts)) == []
    assert list(notes(facts)) == []


def mapping(perms: str, pages: int, sharers: int, anonymous: int) -> proc.SmapsEntry:
    """A mapping whose every page is in `sharers` processes."""
    rss = pages << 12
    return VDSO._replace(
        entry=VDSO.entry._replace(perms=perms), rss=rss, pss=rss // sharers, anonymous=anonymous << 12
    )


@given(st.integers(2, 9), st.integers(1, 1 << 20))
def test_a_page_that_n_processes_share_becomes_n_minus_1_more(sharers: int, pages: int) -> None:
    shared = mapping("rw-p", pages * sharers, sharers, pages * sharers)
    of_a_file, shmem = mapping("r--p", pages, sharers, 0), mapping("rw-s", pages, sharers, pages)
    members = [process(10 + at, smaps=(VDSO, shared, of_a_file, shmem)) for at in range(sharers)]
    more = pages * sharers * (sharers - 1) << 12
    assert bytes_of_copies([member.smaps for member in members]) == more
    assert bytes_of_copies([members[0].smaps]) == 0
    found = list(notes(tree(*members)))
    assert [f"up to {more >> 20} MiB more" in note for note in found] == ([True] if more >> 20 else [])


@given(st.sampled_from(sorted(NAMESPACES)), st.integers(1, 5), st.data())
def test_each_namespace_of_a_childs_own_is_one_obstacle_of_that_child(
    name: str, count: int, data: st.DataObject
) -> None:
    odd = data.draw(st.integers(1, count))
    children = [process(10 + at) for at in range(count + 1)]
    own = {**NAMESPACES, name: 7}
    thread = replace(children[odd].threads[0], namespaces=own)
    children[odd] = replace(children[odd], namespaces=own, threads=(thread,))
    (obstacle,) = obstacles(tree(*children))
    assert obstacle.pid == 10 + odd
    assert name.removesuffix("_for_children") in obstacle.why


@given(st.sets(st.sampled_from(BORROWED), min_size=1))
def test_a_tree_in_other_namespaces_is_one_note_naming_them(names: set[str]) -> None:
    facts = tree(process(10), our_namespaces={**NAMESPACES, **dict.fromkeys(names, 7)})
    assert list(obstacles(facts)) == []
    (note,) = notes(facts)
    assert set(note[note.index("(") + 1 : note.index(")")].split(", ")) == names


def test_a_kernel_without_some_namespaces_is_no_obstacle() -> None:
    few = {"mnt": 100, "pid": 105, "pid_for_children": 105}
    thread = ThreadFacts(10, 10, 0, few, ())
    assert list(obstacles(tree(process(10, namespaces=few, threads=(thread,)), our_namespaces=few))) == []


@given(st.sampled_from(["Z", "S"]), st.booleans())
def test_the_dead_are_left_in_peace(state: str, kernel_thread: bool) -> None:
    """Only a root that cannot be moved is an obstacle; a zombie child travels as one."""
    stat = replace(process(11).stat, state=state)
    other = process(
        11, stat=stat, kernel_thread=kernel_thread, smaps=(), threads=(), namespaces={}, elf_class=0
    )
    if state == "Z" or kernel_thread:
        assert list(obstacles(tree(process(10), other))) == []
        assert len(list(obstacles(tree(other)))) == 1


@given(st.integers(2, 100), st.integers(2, 100))
def test_what_is_shared_or_left_behind_names_both_sides(other: int, number: int) -> None:
    facts = tree(
        process(10),
        sharing=(Sharing(10, other, "its memory (CLONE_VM)"),),
        ipc_uses=(LastUse(10, "semaphore set", number),),
    )
    shared, left = obstacles(facts)
    assert shared.why == f"shares its memory (CLONE_VM) with process {other}"
    assert f"semaphore set {number}," in left.why


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_every_trouble_of_every_thread_is_said(troubles: list[int]) -> None:
    threads = tuple(
        ThreadFacts(
            tid=20 + at,
            vtid=20 + at,
            tracer=99 if trouble == 1 else 0,
            namespaces={**NAMESPACES, "net": 7} if trouble == 3 else NAMESPACES,
            apart=(),
        )
        for at, trouble in enumerate(troubles)
    )
    stuck = {20 + at: "sleeps on" for at, trouble in enumerate(troubles) if trouble == 2}
    said = [obstacle.where for obstacle in obstacles(tree(process(10, threads=threads), stuck=stuck))]
    assert said == [f"thread {20 + at}" for at, trouble in enumerate(troubles) if trouble]


def test_every_obstacle_has_a_way_out() -> None:
    stat = replace(process(10).stat, policy=6)
    facts = tree(process(10, stat=stat, smaps=(), elf_class=1), our_pid=10)
    found = list(obstacles(facts))
    assert len(found) == 4
    assert all(obstacle.remedy and obstacle.where == "process" for obstacle in found)


# --- who would start a second one ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "unit"),
    [
        ({"": "/system.slice/redis-server.service"}, "redis-server.service"),
        ({"name=systemd": "/system.slice/nginx.service", "": "/"}, "nginx.service"),
        ({"": "/user.slice/user-0.slice/user@0.service/app.slice/bot.service"}, "bot.service"),
        ({"": "/system.slice/pg.service/lazyproc-12"}, "pg.service"),
        ({"": "/user.slice/user-0.slice/session-3.scope"}, ""),
        ({"": "/user.slice/user-0.slice/user@0.service/init.scope"}, ""),
        ({"": "/user.slice/user-0.slice/user@0.service"}, ""),
        ({"": "/"}, ""),
        ({}, ""),
    ],
)
def test_the_systemd_unit_of_a_process(groups: dict[str, str], unit: str) -> None:
    assert unit_in(groups) == unit


def test_who_would_start_a_second_one_is_named() -> None:
    def said(supervisor: Supervisor) -> str:
        return "; ".join(notes(tree(process(10), supervisor=supervisor)))

    assert "pid 10: is in the systemd unit redis.service" in said(Supervisor("redis.service", None))
    assert "pid 10: its parent, pid 7 (runsv)" in said(Supervisor("", (7, "runsv")))
    for name in ("bash", "python3", "sshd"):
        assert said(Supervisor("", (7, name))) == ""


def test_address_space_of_all_processes_counts_but_for_what_is_only_reserved() -> None:
    def mapping(bytes_: int, perms: str = "rw-p", rss: int = 0) -> proc.SmapsEntry:
        entry = proc.MapsEntry(1 << 20, (1 << 20) + bytes_, perms, 0, (0, 0), 0, "", False)
        return VDSO._replace(entry=entry, rss=rss)

    members = (
        process(10, smaps=(VDSO, mapping(1 << 40, "---p", 4096))),
        process(11, smaps=(mapping(2 << 40), mapping(8 << 40, "---p"))),
    )
    assert not [*too_much_private(tree(*members), 3 << 40)]
    (against,) = too_much_private(tree(*members), (3 << 40) - 1)
    assert (against.pid, against.where) == (11, "process")
    assert "has 3.00 TiB of private memory, and no more than 3.00 can follow it" in against.why
