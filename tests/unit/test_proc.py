"""Texts of /proc: real ones read as they should, rendered ones come back, garbled ones are named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import UnexpectedProcText
from lazyproc.kernel import proc
from lazyproc.kernel.proc import RLIM_INFINITY, MapsEntry
from lazyproc.kernel.proc_fdinfo import fdinfo

PARSERS: dict[str, Callable[[bytes], object]] = {
    "maps": proc.maps,
    "smaps": proc.smaps,
    "auxv": proc.auxv,
    "stat": proc.stat,
    "status": proc.status,
    "limits": proc.limits,
    "cgroup": proc.cgroup,
    "task/TID/children": proc.children,
    "timers": proc.timers,
    "timens_offsets": proc.timens_offsets,
    "task/TID/syscall": proc.syscall,
    "task/TID/sched": proc.sched,
    "fdinfo/FD": fdinfo,
}

TEXTS = {file.name: file.read_bytes() for file in (Path(__file__).parent / "proc").iterdir()}
SMAPS, STAT, STATUS = TEXTS["smaps"], TEXTS["stat"], TEXTS["status"]

# --- memory -------------------------------------------------------------------------------------------------


def seq_path(path: str) -> bytes:
    return os.fsencode(path).replace(b"\n", b"\\012")


def render(entry: MapsEntry) -> bytes:
    """A line as fs/proc/task_mmu.c show_map_vma writes it: the name begins in column 74 if there is one."""
    columns = b"%08x-%08x %s %08x %02x:%02x %d " % (
        entry.start,
        entry.end,
        entry.perms.encode(),
        entry.offset,
        *entry.dev,
        entry.inode,
    )
    name = seq_path(entry.path) + (b" (deleted)" if entry.deleted else b"")
    return (columns.ljust(73) + name if name else columns) + b"\n"


def unambiguous(path: bytes) -> bool:
    return b"\\012" not in path and not path.endswith(b" (deleted)")


paths = st.binary().map(lambda tail: b"/" + tail.replace(b"\0", b"")).filter(unambiguous).map(os.fsdecode)
addresses = st.integers(0, 2**64 - 1)
entries = st.builds(
    MapsEntry,
    start=addresses,
    end=addresses,
    perms=st.from_regex(r"\A[r-][w-][x-][ps]\Z"),
    offset=addresses,
    dev=st.tuples(st.integers(0, 2**12 - 1), st.integers(0, 2**20 - 1)),
    inode=st.integers(0, 2**64 - 1),
    path=st.just("") | st.sampled_from(["[heap]", "[anon:my heap]", "[stack]"]) | paths,
    deleted=st.just(False),
).flatmap(
    lambda entry: st.booleans().map(lambda deleted: entry._replace(deleted=deleted and entry.path != ""))
)


@given(st.lists(entries, max_size=4))
def test_maps_come_back(mappings: list[MapsEntry]) -> None:
    assert proc.maps(b"".join(map(render, mappings))) == tuple(mappings)


def test_a_backslash_in_a_path_is_not_an_escape() -> None:
    (entry,) = proc.maps(b"1000-2000 r--p 00000000 fe:00 7                  /a\\040b\\134 c\\012d (x)\n")
    assert entry.path == "/a\\040b\\134 c\nd (x)"


def test_smaps() -> None:
    first, second = proc.smaps(SMAPS)
    mapping = MapsEntry(
        0x561232764000, 0x561232765000, "rw-p", 0x2000, (0xFE, 0), 26723, "/usr/bin/x (y)", False
    )
    assert first.entry == mapping
    assert (first.page_size, first.rss, first.anonymous, first.anon_huge) == (4096, 4096, 3072, 2 << 20)
    assert (first.pss, first.swap, first.swap_pss) == (4096, 1024, 9216)
    assert (first.locked, first.protection_key) == (2048, 5)
    assert first.vm_flags == {"rd", "wr", "mr", "mw", "me", "ac", "sd"}
    assert second.entry.path == "[vvar]"
    assert (second.page_size, second.rss, second.pss) == (2 << 20, 60 << 10, 20 << 10)
    assert second.protection_key == 0
    assert second.vm_flags == {"rd", "mr", "de", "dd"}


def test_a_block_of_smaps_cut_short_is_refused() -> None:
    with pytest.raises(UnexpectedProcText, match="VmFlags"):
        proc.smaps(SMAPS[: SMAPS.rindex(b"VmFlags")])


def test_auxv() -> None:
    data = bytes.fromhex("2100000000000000 00809c991f7f0000 0000000000000000 0000000000000000")
    assert proc.auxv(data) == (33, 0x7F1F999C8000, 0, 0)
    with pytest.raises(UnexpectedProcText, match="AT_NULL"):
        proc.auxv(data[:16])


# --- tasks --------------------------------------------------------------------------------------------------


def test_stat() -> None:
    stat = proc.stat(STAT)
    assert (stat.pid, stat.comm, stat.state, stat.ppid, stat.pgrp, stat.session) == (
        6102,
        "python3",
        "t",
        6099,
        6098,
        3113,
    )
    assert (stat.tty, stat.flags, stat.priority, stat.nice, stat.num_threads) == (34816, 4194304, 20, -5, 7)
    assert (stat.start_time, stat.start_code, stat.end_code) == (125584, 94636156014592, 94636156014933)
    assert (stat.start_stack, stat.exit_signal, stat.processor) == (140733964523456, 17, 1)
    assert (stat.rt_priority, stat.policy, stat.exit_code) == (40, 1, 256)
    assert (stat.start_data, stat.end_data, stat.start_brk) == (
        94636156026288,
        94636156026904,
        94636470685696,
    )
    assert (stat.arg_start, stat.arg_end) == (140733964527856, 140733964527914)
    assert (stat.env_start, stat.env_end) == (140733964527915, 140733964529615)


@given(st.binary(max_size=15).filter(lambda name: b"\0" not in name))
def test_any_name_of_a_command_comes_back(name: bytes) -> None:
    assert proc.stat(STAT.replace(b"python3", name)).comm == os.fsdecode(name)


def test_status() -> None:
    status = proc.status(STATUS)
    assert status.comm == "a\nb"
    assert (status.state, status.tgid, status.pid, status.ppid, status.tracer_pid) == (
        "S",
        6102,
        6103,
        6099,
        7,
    )
    assert (status.uid, status.gid, status.groups) == ((1, 2, 3, 4), (5, 6, 7, 8), (10, 20))
    assert (status.ns_tgid, status.ns_pid) == ((6102, 1), (6103, 2))
    assert (status.umask, status.kernel_thread, status.thp_enabled, status.threads) == (0o27, False, False, 3)
    assert (status.sig_pending, status.shared_pending) == (1, 2)
    assert (status.sig_blocked, status.sig_ignored, status.sig_caught) == (1 << 63, 0x1001000, 4)
    assert (status.cap_inheritable, status.cap_permitted, status.cap_effective) == (1, 0x1FFFEFFFFFF, 2)
    assert (status.cap_bounding, status.cap_ambient) == (3, 4)
    assert (status.no_new_privs, status.seccomp, status.seccomp_filters) == (True, 2, 3)
    assert (status.voluntary_switches, status.involuntary_switches) == (33, 6)


def test_a_zombie_has_no_umask() -> None:
    assert proc.status(STATUS.replace(b"Umask:\t0027\n", b"")).umask is None


def test_limits_are_in_the_order_of_their_numbers() -> None:
    limits = proc.limits(TEXTS["limits"])
    assert limits[0] == (RLIM_INFINITY, RLIM_INFINITY)
    assert limits[3] == (8388608, RLIM_INFINITY)
    assert limits[7] == (20000, 1048576)
    assert limits[8] == (2**64 - 2, 2**64 - 2)
    assert limits[13] == (1, 2)
    assert len(limits) == 16


def test_cgroup() -> None:
    text = b"9:name=systemd:/\n4:memory:/a:b\n3:cpu,cpuacct:/x y\n0::/user.slice\n"
    assert proc.cgroup(text) == {
        "name=systemd": "/",
        "memory": "/a:b",
        "cpu,cpuacct": "/x y",
        "": "/user.slice",
    }


def test_children() -> None:
    assert proc.children(b"12 13 4194303 ") == (12, 13, 4194303)
    assert proc.children(b"") == ()


# --- time ---------------------------------------------------------------------------------------------------


def test_timers_by_id() -> None:
    zero, one, two = proc.timers(TEXTS["timers"])
    assert zero == proc.PosixTimerInfo(0, signal=35, value=1, notify=4, target=6103, clock=-6)
    assert one == proc.PosixTimerInfo(1, signal=34, value=0x7FFF00001234, notify=1, target=6102, clock=0)
    assert two == proc.PosixTimerInfo(2, signal=14, value=0, notify=0, target=6102, clock=1)


def test_timens_offsets() -> None:
    text = b"monotonic        1000         1\nboottime           -5 999999999\n"
    assert proc.timens_offsets(text) == proc.TimensOffsets(1000 * 10**9 + 1, -4 * 10**9 - 1)


def test_syscall() -> None:
    text = b"230 0x1 0xffffffffffffffff 0x7fff296303d0 0x0 0x0 0x0 0x7fff296303b8 0x7effe74ed503\n"
    assert proc.syscall(text) == proc.BlockedIn(230, (1, 2**64 - 1, 0x7FFF296303D0, 0, 0, 0))
    assert proc.syscall(b"running\n") is None
    assert proc.syscall(b"-1 0x7fff296303b8 0x7effe74ed503\n") is None


def test_the_name_of_a_task_is_not_taken_for_a_value() -> None:
    times = proc.SchedTimes(exec_start_ns=1255594829947, voluntary=33)
    text = TEXTS["sched"]
    assert proc.sched(text) == times
    assert proc.sched(text.replace(b"se.exec_start (", b"x\nse.exec_start : 1\n (", 1)) == times


# --- what is not understood ---------------------------------------------------------------------------------


def cut(text: bytes) -> st.SearchStrategy[bytes]:
    return st.integers(0, len(text)).map(lambda length: text[:length])


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.binary() | st.sampled_from(sorted(TEXTS.values())).flatmap(cut))
def test_garbled_text_is_read_or_refused_by_name(name: str, data: bytes) -> None:
    refusal = None
    try:
        PARSERS[name](data)
    except UnexpectedProcText as error:
        refusal = error
    assert refusal is None or refusal.where == f"/proc/PID/{name}"


def test_an_empty_file_is_refused_where_there_is_always_something() -> None:
    for name in ("auxv", "stat", "status", "limits", "timens_offsets", "task/TID/sched", "fdinfo/FD"):
        with pytest.raises(UnexpectedProcText):
            PARSERS[name](b"")
