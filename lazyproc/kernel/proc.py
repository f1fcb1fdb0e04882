"""Parsers of /proc: bytes in, plain facts out; and the few readers that take a pid.

Typical use is `proc.maps(proc.read(pid, "maps"))`. Formats: proc(5), fs/proc/array.c (stat, status),
fs/proc/base.c (limits, timers, syscall), fs/proc/task_mmu.c (maps, smaps), kernel/sched/debug.c (sched). Text
that does not look as described there raises UnexpectedProcText; keys a newer kernel adds are passed over.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from lazyproc.errors import LazyprocError, NoSuchProcess, PermissionDenied, UnexpectedProcText
from lazyproc.facts import dataclass

RLIM_INFINITY = 2**64 - 1
SIGEV_THREAD_ID = 4
_NOTIFY = {b"signal": 0, b"none": 1, b"thread": 2}  # SIGEV_*, as fs/proc/base.c show_timer spells them

_T = TypeVar("_T")
Device = tuple[int, int]  # major, minor


def parser(name: str, folder: str = "/proc/PID") -> Callable[[Callable[[bytes], _T]], Callable[[bytes], _T]]:
    """Turn what plain parsing code raises on odd input into UnexpectedProcText naming that file of /proc."""

    def wrap(parse: Callable[[bytes], _T]) -> Callable[[bytes], _T]:
        @functools.wraps(parse)
        def checked(data: bytes) -> _T:
            try:
                return parse(data)
            except (ValueError, LookupError, struct.error) as error:
                raise UnexpectedProcText(
                    f"cannot be understood ({error})",
                    where=f"{folder}/{name}",
                    remedy="this kernel writes it in an unknown form; please report it with the text",
                ) from error

        return checked

    return wrap


# --- memory -------------------------------------------------------------------------------------------------


class MapsEntry(NamedTuple):
    """One line of maps. A tuple, not a dataclass: thousands are built while the process stands still."""

    start: int
    end: int
    perms: str  # "rwxp": the last is p(rivate) or s(hared)
    offset: int  # bytes
    dev: Device
    inode: int
    path: str  # without " (deleted)"; "" anonymous, "[heap]", "[anon:name]", "/memfd:name"
    deleted: bool


class SmapsEntry(NamedTuple):
    """One block of smaps; sizes in bytes."""

    entry: MapsEntry
    page_size: int  # of the mapping: 4096, or the huge page size of hugetlbfs
    rss: int
    pss: int  # each page divided by the number of mappings it has, in whichever processes
    anonymous: int
    anon_huge: int  # AnonHugePages
    swap: int
    swap_pss: int
    locked: int
    protection_key: int
    vm_flags: frozenset[str]  # the two-letter names of VmFlags


_File = tuple[Device, int, str, bool]  # the last columns of a line: dev, inode, path, deleted


def _file(text: bytes) -> _File:
    """The kernel escapes nothing in the path but newlines (seq_path), so a backslash stays itself."""
    dev, inode, *rest = text.split(None, 2)
    major, minor = dev.split(b":")
    path = rest[0] if rest else b""
    deleted = path.endswith(b" (deleted)")
    if deleted:
        path = path[: -len(b" (deleted)")]
    path = path.replace(b"\\012", b"\n")
    return (int(major, 16), int(minor, 16)), int(inode), os.fsdecode(path), deleted


def _maps_entry(line: bytes, files: dict[bytes, _File]) -> MapsEntry:
    """`files` remembers the last columns, which most lines share with their neighbours."""
    span, perms, offset, columns = line.split(None, 3)
    file = files.get(columns)
    if file is None:
        file = files[columns] = _file(columns)
    start, end = span.split(b"-")
    return MapsEntry(int(start, 16), int(end, 16), perms.decode(), int(offset, 16), *file)


@parser("maps")
def maps(data: bytes) -> tuple[MapsEntry, ...]:
    """/proc/PID/maps, in address order.

    Two names cannot be told apart in this text: one that ends in " (deleted)" from a deleted file's, and one
    that contains a backslash and "012" from one with a newline; /proc/PID/map_files settles both.
    """
    files: dict[bytes, _File] = {}
    return tuple([_maps_entry(line, files) for line in data.split(b"\n") if line])


# Only what SmapsEntry holds: a block has some 24 lines. VmFlags is the last, and no path holds a newline.
_SIZES = re.compile(
    rb"^(KernelPageSize|Rss|Pss|Anonymous|AnonHugePages|Swap|SwapPss|Locked|ProtectionKey): *(\d+)",
    re.MULTILINE,
)
_VM_FLAGS = re.compile(rb"^VmFlags:(.*)\n", re.MULTILINE)


@parser("smaps")
def smaps(data: bytes) -> tuple[SmapsEntry, ...]:
    """/proc/PID/smaps, in address order. The kernel walks every page table for it: far slower than maps."""
    files: dict[bytes, _File] = {}
    blocks = _VM_FLAGS.split(data)  # text, flags, text, flags, ..., rest
    if blocks[-1].strip():
        raise ValueError("the last block has no VmFlags")
    texts = zip(blocks[:-1:2], blocks[1::2], strict=True)
    return tuple([_smaps_entry(text, flags, files) for text, flags in texts])


def _smaps_entry(text: bytes, flags: bytes, files: dict[bytes, _File]) -> SmapsEntry:
    header, _, rest = text.partition(b"\n")
    numbers = {key: int(value) for key, value in _SIZES.findall(rest)}
    return SmapsEntry(
        entry=_maps_entry(header, files),
        page_size=numbers[b"KernelPageSize"] * 1024,
        rss=numbers[b"Rss"] * 1024,
        pss=numbers[b"Pss"] * 1024,
        anonymous=numbers[b"Anonymous"] * 1024,
        anon_huge=numbers[b"AnonHugePages"] * 1024,
        swap=numbers[b"Swap"] * 1024,
        swap_pss=numbers.get(b"SwapPss", 0) * 1024,
        locked=numbers[b"Locked"] * 1024,
        protection_key=numbers.get(b"ProtectionKey", 0),
        vm_flags=frozenset(flags.decode("ascii").split()),
    )


@parser("auxv")
def auxv(data: bytes) -> tuple[int, ...]:
    """/proc/PID/auxv as key, value, key, value, ..., the closing AT_NULL pair included."""
    words = struct.unpack(f"<{len(data) // 8}Q", data)
    if len(words) % 2 or words[-2:-1] != (0,):
        raise ValueError("no AT_NULL pair at the end")
    return words


# --- tasks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stat:
    """stat of a process or thread. The addresses are 0, or 1, for a reader who may not ptrace the process."""

    pid: int
    comm: str
    state: str  # one letter: R S D T t Z X I
    ppid: int
    pgrp: int
    session: int
    tty: int  # dev_t of the controlling terminal, 0 none
    flags: int  # PF_*
    priority: int
    nice: int
    num_threads: int
    start_time: int  # clock ticks since boot
    start_code: int
    end_code: int
    start_stack: int
    exit_signal: int
    processor: int  # where it runs or ran last
    rt_priority: int
    policy: int  # SCHED_*, without SCHED_RESET_ON_FORK
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int  # wait status


def lives(pid: int, started: int) -> bool:
    """Whether the process that began at `started` (Stat.start_time) still lives, and no other one has its number."""
    try:
        found = stat(read(pid, "stat"))
    except NoSuchProcess:
        return False
    return found.start_time == started and found.state not in "ZX"


@parser("stat")
def stat(data: bytes) -> Stat:
    """/proc/PID/stat. The command's name is not escaped there: it ends at the *last* closing parenthesis."""
    opening, closing = data.index(b"("), data.rindex(b")")
    state, *numbers = data[closing + 1 :].split()
    n = [0, 0, 0, 0, *map(int, numbers)]  # numbered as in proc(5): n[4] is ppid
    return Stat(
        pid=int(data[:opening]),
        comm=os.fsdecode(data[opening + 1 : closing]),
        state=state.decode("ascii"),
        ppid=n[4],
        pgrp=n[5],
        session=n[6],
        tty=n[7],
        flags=n[9],
        priority=n[18],
        nice=n[19],
        num_threads=n[20],
        start_time=n[22],
        start_code=n[26],
        end_code=n[27],
        start_stack=n[28],
        exit_signal=n[38],
        processor=n[39],
        rt_priority=n[40],
        policy=n[41],
        start_data=n[45],
        end_data=n[46],
        start_brk=n[47],
        arg_start=n[48],
        arg_end=n[49],
        env_start=n[50],
        env_end=n[51],
        exit_code=n[52],
    )


class Ids(NamedTuple):
    """A Uid or Gid line."""

    real: int
    effective: int
    saved: int
    fs: int


@dataclass(frozen=True, slots=True)
class Status:
    """status of a process or thread. Signal and capability sets are bit masks (bit n-1 is signal n)."""

    state: str
    comm: str
    tgid: int
    pid: int
    ppid: int
    tracer_pid: int  # 0 when nobody traces it
    uid: Ids
    gid: Ids
    groups: tuple[int, ...]
    ns_tgid: tuple[int, ...]  # the tgid in each pid namespace, the reader's first, the task's own last
    ns_pid: tuple[int, ...]
    ns_pgid: tuple[int, ...]  # 0 in a namespace that does not see the group's number
    ns_sid: tuple[int, ...]
    umask: int | None  # None for a zombie
    locked_kib: int  # VmLck: mappings that mlock(2) holds
    kernel_thread: bool
    thp_enabled: bool
    threads: int
    sig_pending: int  # of this thread
    shared_pending: int  # of the process
    sig_blocked: int
    sig_ignored: int
    sig_caught: int
    cap_inheritable: int
    cap_permitted: int
    cap_effective: int
    cap_bounding: int
    cap_ambient: int
    no_new_privs: bool
    seccomp: int  # 0 none, 1 strict, 2 filter
    seccomp_filters: int
    voluntary_switches: int
    involuntary_switches: int


def _in_order(*keys: str) -> re.Pattern[bytes]:
    """Matches lines "Key:\tvalue" in this order with a group for each value. What stands between them is passed over;
    a key with "?" may be missing. Atomic and possessive: nothing is looked at twice.
    """
    lines = (
        rb"(?>(?:.*\n)*?%s:\t(.*)\n)%s" % (key.rstrip("?").encode(), b"?+" * ("?" in key)) for key in keys
    )
    return re.compile(b"".join(lines))


# A zombie has no Umask and no VmLck, a kernel without CONFIG_PID_NS no NS lines.
_STATUS = _in_order(
    *("Name", "Umask?", "State", "Tgid", "Pid", "PPid", "TracerPid", "Uid", "Gid", "Groups"),
    *("NStgid?", "NSpid?", "NSpgid?", "NSsid?", "Kthread?", "VmLck?", "THP_enabled?", "Threads"),
    *("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
    *("NoNewPrivs", "Seccomp?", "Seccomp_filters?", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"),
)


@parser("status")
def status(data: bytes) -> Status:
    """/proc/PID/status or /proc/PID/task/TID/status."""
    lines = _STATUS.match(data)
    if lines is None:
        raise ValueError("a line is missing")
    (
        name, umask, state, tgid, pid, ppid, tracer, uid, gid, groups,
        ns_tgid, ns_pid, ns_pgid, ns_sid, kthread, locked, thp, threads,
        pending, shared_pending, blocked, ignored, caught, inheritable, permitted, effective, bounding, ambient,
        no_new_privs, seccomp, filters, voluntary, involuntary,
    ) = lines.groups()  # fmt: skip
    return Status(
        state[:1].decode("ascii"),
        _name(name),
        int(tgid),
        int(pid),
        int(ppid),
        int(tracer),
        *_owner(uid, gid, groups),
        _ints(tgid if ns_tgid is None else ns_tgid),
        _ints(pid if ns_pid is None else ns_pid),
        _ints(ns_pgid or b"0"),
        _ints(ns_sid or b"0"),
        None if umask is None else int(umask, 8),
        int((locked or b"0 kB")[:-3]),
        kthread == b"1",
        thp != b"0",
        int(threads),
        int(pending, 16),
        int(shared_pending, 16),
        int(blocked, 16),
        int(ignored, 16),
        int(caught, 16),
        *_rights(inheritable, permitted, effective, bounding, ambient),
        no_new_privs == b"1",
        int(seccomp or b"0"),
        int(filters or b"0"),
        int(voluntary),
        int(involuntary),
    )


# Of most threads of a tree these are the same.
@functools.lru_cache(maxsize=64)
def _owner(uid: bytes, gid: bytes, groups: bytes) -> tuple[Ids, Ids, tuple[int, ...]]:
    return _ids(uid), _ids(gid), _ints(groups)


@functools.lru_cache(maxsize=64)
def _rights(
    inheritable: bytes, permitted: bytes, effective: bytes, bounding: bytes, ambient: bytes
) -> tuple[int, int, int, int, int]:
    return int(inheritable, 16), int(permitted, 16), int(effective, 16), int(bounding, 16), int(ambient, 16)


def _name(text: bytes) -> str:
    """The kernel escapes newlines and backslashes here, and nowhere else (proc_task_name, fs/proc/array.c)."""
    if b"\\" in text:
        text = b"\\".join(part.replace(b"\\n", b"\n") for part in text.split(b"\\\\"))
    return os.fsdecode(text)


def _ids(text: bytes) -> Ids:
    real, effective, saved, fs = _ints(text)
    return Ids(real, effective, saved, fs)


@parser("limits")
def limits(data: bytes) -> tuple[tuple[int, int], ...]:
    """/proc/PID/limits as (soft, hard), in the order of RLIMIT_*; unlimited is RLIM_INFINITY."""
    rows = data.rstrip(b"\n").split(b"\n")[
        1:
    ]  # columns of fixed width: names contain spaces, units may be empty
    if len(rows) != 16:
        raise ValueError(f"{len(rows)} limits instead of 16")
    return tuple((_limit(row[26:46]), _limit(row[47:67])) for row in rows)


def _limit(text: bytes) -> int:
    text = text.strip()
    return RLIM_INFINITY if text == b"unlimited" else int(text)


@parser("cgroup")
def cgroup(data: bytes) -> dict[str, str]:
    """/proc/PID/cgroup: controllers, as written there, to path; "" is the v2 hierarchy."""
    lines = (line.split(b":", 2) for line in data.split(b"\n") if line)
    return {controllers.decode("ascii"): os.fsdecode(path) for _, controllers, path in lines}


class Mount(NamedTuple):
    """One line of mountinfo: the directory `root` of a file system of this `kind` is seen at `point`."""

    dev: Device
    root: str
    point: str
    kind: str
    options: tuple[str, ...]  # of the file system


@parser("mountinfo")
def mountinfo(data: bytes) -> tuple[Mount, ...]:
    """ "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw": blanks in paths are \\040 (fs/proc_namespace.c)."""
    rows = [line.partition(b" - ") for line in data.split(b"\n") if line]
    return tuple(_mount(head.split(b" "), tail.split(b" ")) for head, _, tail in rows)


def _mount(head: Sequence[bytes], tail: Sequence[bytes]) -> Mount:
    major, minor = head[2].split(b":")
    root, point, kind, options = (
        os.fsdecode(_unescape(word)) for word in (head[3], head[4], tail[0], tail[2])
    )
    return Mount((int(major), int(minor)), root, point, kind, tuple(options.split(",")))


def _unescape(path: bytes) -> bytes:
    first, *rest = path.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)


@parser("task/TID/children")
def children(data: bytes) -> tuple[int, ...]:
    """/proc/PID/task/TID/children: pids of the children this thread has (adopted ones hang at the leader)."""
    return _ints(data)


# --- time ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PosixTimerInfo:
    """One timer of timer_create(2); how much time is left only the process itself can ask (timer_gettime)."""

    id: int
    signal: int
    value: int  # sigev_value as an unsigned 64-bit number
    notify: int  # SIGEV_*
    target: int  # tid for SIGEV_THREAD_ID, else pid, in the pid namespace of the reader's /proc
    clock: int


@parser("timers")
def timers(data: bytes) -> tuple[PosixTimerInfo, ...]:
    """/proc/PID/timers, by id."""
    lines = list(_keyed(line for line in data.split(b"\n") if line))
    rows = [dict(lines[at : at + 4]) for at in range(0, len(lines), 4)]
    return tuple(sorted((_timer(row) for row in rows), key=lambda timer: timer.id))


def _timer(row: Mapping[bytes, bytes]) -> PosixTimerInfo:
    signal, value = row[b"signal"].split(b"/")
    how, whom = row[b"notify"].split(b"/")
    kind, target = whom.split(b".")
    return PosixTimerInfo(
        id=int(row[b"ID"]),
        signal=int(signal),
        value=int(value, 16),
        notify=_NOTIFY[how] | (SIGEV_THREAD_ID if kind == b"tid" else 0),
        target=int(target),
        clock=int(row[b"ClockID"]),
    )


@dataclass(frozen=True, slots=True)
class TimensOffsets:
    """What a time namespace adds to the host's clocks, in ns (time_namespaces(7))."""

    monotonic_ns: int
    boottime_ns: int


@parser("timens_offsets")
def timens_offsets(data: bytes) -> TimensOffsets:
    """/proc/PID/timens_offsets: of the namespace the *children* of the process will live in."""
    rows = {
        name: int(s) * 10**9 + int(ns) for name, s, ns in map(bytes.split, data.rstrip(b"\n").split(b"\n"))
    }
    return TimensOffsets(monotonic_ns=rows[b"monotonic"], boottime_ns=rows[b"boottime"])


@dataclass(frozen=True, slots=True)
class BlockedIn:
    """The syscall a thread sleeps in, with its six arguments."""

    nr: int
    args: tuple[int, ...]


@parser("task/TID/syscall")
def syscall(data: bytes) -> BlockedIn | None:
    """/proc/PID/task/TID/syscall; None when the thread runs, or sleeps outside a syscall."""
    if data == b"running\n":
        return None
    fields = data.split()
    if len(fields) == 3 and fields[0] == b"-1":
        return None
    nr, *args, _sp, _ip = fields
    if len(args) != 6:
        raise ValueError(f"{len(args)} arguments instead of 6")
    return BlockedIn(int(nr), tuple(int(arg, 16) for arg in args))


@dataclass(frozen=True, slots=True)
class SchedTimes:
    """When a thread last ran, on the clock of its run queue, and how often it gave up the CPU."""

    exec_start_ns: int
    voluntary: int  # switches


@parser("task/TID/sched")
def sched(data: bytes) -> SchedTimes:
    """/proc/PID/task/TID/sched, where times are in milliseconds with six decimals."""
    return SchedTimes(
        exec_start_ns=int(_sched_value(data, b"se.exec_start").replace(b".", b"")),
        voluntary=int(_sched_value(data, b"nr_voluntary_switches")),
    )


def _sched_value(data: bytes, key: bytes) -> bytes:
    """The last line of that name: the task's own name stands unescaped in the first."""
    start = data.rindex(b"\n" + key + b" ")
    return data[start + 1 : data.index(b"\n", start + 1)].rpartition(b":")[2].strip()


# --- readers ------------------------------------------------------------------------------------------------


@functools.cache
def boot_id() -> str:
    """Of the kernel that runs, until the next boot."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def pid_max() -> int:
    """One above the highest number that a process can have in our pid namespace. A new one has its own since Linux
    6.14, the highest there is; before it there is one for all.
    """
    with open("/proc/sys/kernel/pid_max") as file:
        return int(file.read())


def read(pid: int, name: str) -> bytes:
    """All of /proc/PID/`name` ("maps", "task/7/stat", "fdinfo/3").

    Raises NoSuchProcess when it is gone, PermissionDenied, and LazyprocError for what else the kernel says.
    """
    path = f"/proc/{pid}/{name}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return b"".join(iter(lambda: os.read(fd, 1 << 16), b""))
        finally:
            os.close(fd)
    except OSError as error:
        raise _failure(error, path) from error


def task_ids(pid: int) -> tuple[int, ...]:
    """The thread ids of a process, the leader first (the kernel lists them in the order of creation)."""
    return tuple(map(int, _list(f"/proc/{pid}/task")))


def descriptor_numbers(pid: int) -> tuple[int, ...]:
    """The open descriptors of a process, ascending."""
    return tuple(sorted(map(int, _list(f"/proc/{pid}/fd"))))


def children_of(pid: int, tid: int) -> tuple[int, ...]:
    """The children of one thread; exact only while the children are stopped (proc(5))."""
    return children(read(pid, f"task/{tid}/children"))


def namespaces(pid: int) -> dict[str, int]:
    """Name of the link in /proc/PID/ns ("net", "time_for_children") to the inode of the namespace.

    A namespace that is gone (a zombie's) or has no member yet (pid_for_children) is left out.
    """
    directory = f"/proc/{pid}/ns"
    found = {}
    for name in _list(directory):
        try:
            target = os.readlink(f"{directory}/{name}")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _failure(error, f"{directory}/{name}") from error
        found[name] = int(target[target.index("[") + 1 : -1])
    return found


def _list(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError as error:
        raise _failure(error, path) from error


def _failure(error: OSError, path: str) -> LazyprocError:
    if error.errno in (errno.ENOENT, errno.ESRCH):
        return NoSuchProcess("it is gone", where=path, remedy="check that the process is still running")
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDenied("the kernel refuses to show it", where=path, remedy="run as root")
    return LazyprocError(os.strerror(error.errno or 0), where=path)


# --- helpers ------------------------------------------------------------------------------------------------


def _keyed(lines: Iterable[bytes]) -> Iterable[tuple[bytes, bytes]]:
    """Lines "Key:  value" as pairs, blanks around the value taken away."""
    for line in lines:
        key, _, value = line.partition(b":")
        yield key, value.strip()


def _ints(text: bytes) -> tuple[int, ...]:
    return tuple(map(int, text.split()))
