"""Checkpoints for hypothesis: any that a dump could give, in the form that a dump gives it.

That form leaves out what says nothing: default signal actions, timers that are not armed, extents without pages;
extents are merged, and nothing stands twice.
"""

from __future__ import annotations

import errno
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from lazyproc.images.pagemap import merge
from lazyproc.model import (
    NETLINK_PROTOCOLS,
    PAGE,
    TIES,
    Checkpoint,
    Clocks,
    Credentials,
    Descriptor,
    Epoll,
    EpollTarget,
    EventFd,
    Extent,
    FileContent,
    Fs,
    InetSocket,
    Inotify,
    InotifyWatch,
    IntervalTimer,
    Limit,
    Membership,
    MemFd,
    MemoryObject,
    Mm,
    MmFlags,
    NetlinkSocket,
    ObjectKind,
    OpenFile,
    Owner,
    Packet,
    Pipe,
    PipeEnd,
    PosixTimer,
    Registers,
    RegularFile,
    Resource,
    Restart,
    Rseq,
    Scheduling,
    SeccompFilter,
    SharedKind,
    SharedMemory,
    SigAction,
    SignalFd,
    SignalStack,
    SocketOptions,
    Task,
    TaskState,
    TcpState,
    TerminalMaster,
    TerminalSlave,
    Thread,
    Tie,
    TimerFd,
    UnixSocket,
    Vma,
    VmaKind,
)

# A checkpoint has so many parts that shrinking one takes minutes; the failing one is printed as it is.
HEAVY = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)

u16 = st.integers(0, 2**16 - 1)
u31 = st.integers(0, 2**31 - 1)
u32 = st.integers(0, 2**32 - 1)
ids = st.integers(1, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
nanoseconds = st.integers(0, 2**62)
# What the kernel allows in a name: any bytes but NUL, as os.fsdecode shows them.
names = st.binary(max_size=15).map(lambda raw: raw.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
paths = names.map(lambda name: "/" + name)
flag_sets = st.frozensets(st.sampled_from(["rd", "wr", "mr", "mw", "me", "ac", "sd", "dc", "hg", "nh", "lo"]))
siginfo = st.binary(min_size=128, max_size=128)
siginfos = st.lists(siginfo, max_size=2).map(tuple)
owners = st.builds(Owner, u31, st.integers(0, 2), st.integers(0, 64), u32, u32)


def tuples_of(elements: st.SearchStrategy[Any], size: int = 3) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(elements, max_size=size).map(tuple)


def numbers(layout: str) -> st.SearchStrategy[tuple[Any, ...]]:
    """As many integers as a struct has, in one draw: what has many fields is quick to make."""
    size = struct.calcsize(layout)
    return st.binary(min_size=size, max_size=size).map(lambda raw: struct.unpack(layout, raw))


# --- threads ------------------------------------------------------------------------------------------------

credentials = st.tuples(numbers("<8I"), tuples_of(u32), numbers("<5QI"), st.booleans()).map(
    lambda drawn: Credentials(*[*drawn[0], drawn[1], *drawn[2], drawn[3]])
)
# The kernel keeps SECCOMP_FILTER_FLAG_LOG (2) of those a filter is added with (kernel/seccomp.c, seccomp_get_metadata).
filters = st.builds(
    SeccompFilter, st.binary(max_size=2).map(lambda raw: raw * 8), st.sampled_from([0, 2, 14])
)


@st.composite
def xsave_areas(draw: st.DrawFn) -> bytes:
    """Areas of every size: real ones with their XCR0 word and AMX, cut ones, and noise."""
    size = draw(st.sampled_from([0, 1, 470, 576, 832, 840, 2440, 2696, 11008]))
    area = bytearray(size)
    for start, chunk in draw(st.lists(st.tuples(st.integers(0, 11008), st.binary(max_size=80)), max_size=6)):
        area[start : start + len(chunk)] = chunk
    if size > 472 and draw(st.booleans()):
        area[464:472] = draw(st.sampled_from([0x3, 0x7, 0x207, 0x2E7, 0x2FF, 0x602E7])).to_bytes(8, "little")
    return bytes(area[:size])


def threads(tid: int) -> st.SearchStrategy[Thread]:
    return st.builds(
        Thread,
        tid=st.just(tid),
        comm=names,
        registers=numbers(f"<{len(Registers._fields)}Q").map(Registers._make),
        xsave=xsave_areas(),
        blocked=u64,
        pending=siginfos,
        altstack=st.none() | st.builds(SignalStack, u64, u31, u64),
        clear_child_tid=u64,
        robust_list=u64,
        robust_list_len=u32,
        rseq=st.none() | st.builds(Rseq, u64, u32, u32),
        credentials=credentials,
        scheduling=st.builds(Scheduling, st.integers(0, 7), st.integers(0, 99), st.integers(-20, 19)),
        pdeath_signal=st.integers(0, 64),
        timer_slack_ns=nanoseconds,
        seccomp_mode=st.integers(0, 2),
        seccomp=tuples_of(filters),
        restart=st.none() | st.builds(Restart, u16, nanoseconds),
    )


# --- files --------------------------------------------------------------------------------------------------

_OF_THE_KERNEL = (VmaKind.VDSO, VmaKind.VVAR, VmaKind.VVAR_VCLOCK)  # private, and nothing else
_OPTION_KEYS = [(1, number) for number in (2, 7, 8, 9, 13, 18, 20, 21, 25, 26)] + [(0, 2), (6, 1), (41, 26)]
options = st.dictionaries(
    st.sampled_from(_OPTION_KEYS),
    st.sampled_from([b"\1\0\0\0", b"\0\0\0\0", b"", b"\1\0\0\0\5\0\0\0", bytes(range(16))]),
).map(SocketOptions)


def packets(file_ids: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[Packet, ...]]:
    return tuples_of(
        st.builds(
            Packet,
            st.binary(max_size=9),
            tuples_of(file_ids, 2),
            st.binary(max_size=16),
            st.none() | st.tuples(u31, u32, u32),
        ),
        2,
    )


@dataclass(frozen=True)
class Pools:
    """What files refer to."""

    file_ids: tuple[int, ...]
    pipes: Mapping[int, Pipe]
    shared: Mapping[int, SharedMemory]
    contents: Mapping[int, FileContent]


@st.composite
def regular_files(draw: st.DrawFn, pools: Pools) -> RegularFile:
    mode = draw(st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFCHR])) | draw(st.integers(0, 0o7777))
    return RegularFile(
        path=draw(paths),
        mode=mode,
        size=draw(nanoseconds),
        mtime_ns=draw(nanoseconds),
        build_id=draw(st.binary(max_size=21)),
        content_id=draw(st.sampled_from([0, *pools.contents])),
        rdev=draw(u64),
    )


@st.composite
def unix_sockets(draw: st.DrawFn, inode: int, file_ids: st.SearchStrategy[int]) -> UnixSocket:
    raw = draw(st.binary(max_size=8)).replace(b"\0", b"x")
    name = draw(st.sampled_from([b"", raw, b"/" + raw, b"\0" + raw]))
    return UnixSocket(
        inode=inode,
        type=draw(st.sampled_from([1, 2, 5])),
        state=draw(st.sampled_from([1, 7, 10])),
        peer=draw(st.integers(0, 20)),
        name=name,
        bound_here=draw(st.booleans()),
        backlog=draw(u31),
        shutdown=draw(st.integers(0, 3)),
        options=draw(options),
        queue=draw(packets(file_ids)),
        mode=draw(st.sampled_from([0, 0o140755])),
        uid=draw(u32),
        gid=draw(u32),
        pending=draw(tuples_of(st.integers(1, 20), 2)),
        path=draw(st.sampled_from(["", "/run" + name.decode("latin-1").replace("\0", ""), "/run/x"])),
        peer_credentials=draw(st.none() | st.tuples(u31, u32, u32)),
        reset=draw(st.booleans()),
    )


@st.composite
def tcp_states(draw: st.DrawFn) -> TcpState:
    sent = draw(st.binary(max_size=8))
    return TcpState(
        send_seq=draw(u32),
        recv_seq=draw(u32),
        send_queue=sent,
        recv_queue=draw(st.binary(max_size=8)),
        unsent=draw(st.integers(0, len(sent))),
        mss=draw(u16),
        options=draw(u16),
        send_wscale=draw(st.integers(0, 14)),
        recv_wscale=draw(st.integers(0, 14)),
        timestamp=draw(u32),
        window=draw(st.just(b"") | st.binary(min_size=20, max_size=20)),
    )


@st.composite
def memberships(draw: st.DrawFn) -> Membership:
    family, length = draw(st.sampled_from([(2, 4), (10, 16)]))
    address = st.binary(min_size=length, max_size=length)
    return Membership(family, draw(address), draw(names), draw(st.booleans()), draw(tuples_of(address)))


ties = st.tuples(st.sampled_from(sorted(TIES)), names).map(lambda each: Tie(*each[0], each[1]))


@st.composite
def inet_sockets(draw: st.DrawFn, inode: int, file_ids: st.SearchStrategy[int]) -> InetSocket:
    family, length = draw(st.sampled_from([(2, 4), (10, 16)]))
    address = st.binary(min_size=length, max_size=length)
    kind, protocol = draw(st.sampled_from([(1, 6), (2, 17)]))
    state = draw(st.integers(1, 12))
    is_connection = protocol == 6 and state not in (2, 3, 6, 7, 10, 12)
    tcp = draw(tcp_states() if is_connection else st.none() | tcp_states())
    return InetSocket(
        inode=inode,
        family=family,
        type=kind,
        protocol=protocol,
        state=state,
        local=(draw(address), draw(u16)),
        remote=draw(st.none() | st.tuples(address, st.integers(1, 65535))),
        backlog=draw(u31),
        shutdown=draw(st.integers(0, 3)),
        options=draw(options),
        v6only=draw(st.booleans()),
        interface=draw(names),
        tcp=tcp,
        queue=draw(packets(file_ids)),
        absent=draw(st.booleans()),
        error=draw(st.sampled_from([0, errno.EPIPE, errno.ECONNRESET])) if state == 7 and tcp else 0,
        memberships=draw(tuples_of(memberships())),
        ties=draw(tuples_of(ties)),
    )


@st.composite
def netlink_sockets(draw: st.DrawFn, inode: int) -> NetlinkSocket:
    groups = draw(st.sets(st.integers(1, 300), max_size=4))
    masks = st.just(0) | st.integers(0, 31).map(lambda bit: 1 << bit)
    return NetlinkSocket(
        inode=inode,
        type=draw(st.sampled_from([2, 3])),
        protocol=draw(st.sampled_from(NETLINK_PROTOCOLS)),
        port=draw(u32),
        groups=tuple(sorted(groups)),
        remote=(draw(u32), draw(masks)),
        options=draw(options),
    )


@st.composite
def terminals(draw: st.DrawFn, number: int) -> TerminalMaster:
    return TerminalMaster(
        number=number,
        path=draw(paths),
        termios=draw(st.binary(min_size=44, max_size=44)),
        locked_termios=draw(st.binary(min_size=36, max_size=36)),
        size=(draw(u16), draw(u16), draw(u16), draw(u16)),
        mode=draw(st.none() | st.integers(0, 0o7777)),
        uid=draw(u32),
        gid=draw(u32),
        session=0,
        foreground=0,
        packets=draw(st.booleans()),
        locked=draw(st.booleans()),
        exclusive=draw(st.booleans()),
        left=draw(st.booleans()),
    )


def with_slaves(files: Mapping[int, OpenFile]) -> dict[int, OpenFile]:
    """A slave in place of each signalfd, where there is a master for it."""
    masters = [f.resource.number for f in files.values() if isinstance(f.resource, TerminalMaster)]
    slave = TerminalSlave(masters[0]) if masters else None
    return {
        number: replace(file, resource=slave) if slave and isinstance(file.resource, SignalFd) else file
        for number, file in files.items()
    }


def resources(number: int, pools: Pools) -> st.SearchStrategy[Resource]:
    file_ids = st.sampled_from(pools.file_ids)
    targets = st.builds(EpollTarget, u31, file_ids, u32, u64)
    choices: list[st.SearchStrategy[Resource]] = [
        regular_files(pools),
        unix_sockets(number, file_ids),
        inet_sockets(number, file_ids),
        netlink_sockets(number),
        terminals(number - 1),
        st.builds(EventFd, u64, st.booleans()),
        st.builds(Epoll, tuples_of(targets)),
        st.builds(TimerFd, st.integers(0, 9), st.integers(0, 1), u64, nanoseconds, nanoseconds),
        st.builds(SignalFd, u64),
        st.builds(Inotify, tuples_of(st.builds(InotifyWatch, u31, paths, u32))),
    ]
    if pools.pipes:
        choices.append(st.builds(PipeEnd, st.sampled_from(sorted(pools.pipes))))
    memfds = [memory.id for memory in pools.shared.values() if memory.kind is not SharedKind.SYSV]
    if memfds:
        choices.append(st.builds(MemFd, st.sampled_from(memfds)))
    return st.one_of(choices)


@st.composite
def open_files(draw: st.DrawFn, number: int, pools: Pools) -> OpenFile:
    resource = draw(resources(number, pools))
    seekable = isinstance(resource, RegularFile | MemFd)
    outside = isinstance(resource, RegularFile | PipeEnd) and number % 3 == 0
    return OpenFile(number, draw(u31), draw(nanoseconds) if seekable else 0, draw(owners), resource, outside)


@st.composite
def contents_of(draw: st.DrawFn, number: int) -> FileContent:
    link = draw(st.booleans())
    if link:
        data: tuple[tuple[int, bytes], ...] = ((0, draw(st.binary(min_size=1, max_size=9))),)
        size = len(data[0][1])
    else:
        parts = draw(tuples_of(st.tuples(st.integers(0, 2**40), st.binary(min_size=1, max_size=9))))
        data, size = parts, 2**41
    return FileContent(
        id=number,
        path=draw(st.just("") | paths),
        mode=(stat.S_IFLNK if link else stat.S_IFREG) | draw(st.integers(0, 0o7777)),
        uid=draw(u32),
        gid=draw(u32),
        size=size,
        atime_ns=draw(nanoseconds),
        mtime_ns=draw(nanoseconds),
        rdev=draw(u64),
        data=data,
    )


@st.composite
def pipes(draw: st.DrawFn, number: int) -> Pipe:
    return Pipe(
        id=number,
        capacity=draw(u31),
        data=draw(st.binary(max_size=9)),
        path=draw(st.just("") | paths),
        packets=draw(tuples_of(u16)),
    )


# --- memory -------------------------------------------------------------------------------------------------


@st.composite
def shared_memory(draw: st.DrawFn, number: int) -> SharedMemory:
    kind = draw(st.sampled_from(SharedKind))
    sysv = kind is SharedKind.SYSV
    return SharedMemory(
        id=number,
        kind=kind,
        size=draw(st.integers(1, 2**62)),
        name=draw(names | st.just("/dev/zero")) if kind is SharedKind.MEMFD else "",
        seals=0 if sysv else draw(st.integers(0, 31)),
        mode=draw(st.integers(0, 0o7777)),
        uid=draw(u32),
        gid=draw(u32),
        sysv_key=draw(st.integers(-(2**31), 2**31 - 1)) if sysv else 0,
        sysv_shmid=number if sysv else 0,
        lazy=draw(st.booleans()),
    )


@st.composite
def vmas(draw: st.DrawFn, start: int, files: tuple[int, ...], objects: tuple[int, ...]) -> Vma:
    kinds = [
        kind
        for kind in VmaKind
        if (kind is not VmaKind.FILE or files) and (kind is not VmaKind.SHARED or objects)
    ]
    kind = draw(st.sampled_from(kinds))
    return Vma(
        start=start,
        end=start + draw(st.integers(1, 4)) * PAGE,
        prot=draw(st.integers(0, 7)),
        flags=0x2 if kind in _OF_THE_KERNEL else draw(st.sampled_from([0x1, 0x2, 0x22, 0x122, 0x4022])),
        kind=kind,
        offset=draw(st.integers(0, 9)) * PAGE if kind in (VmaKind.FILE, VmaKind.SHARED) else 0,
        file_id=draw(st.sampled_from(files)) if kind is VmaKind.FILE else 0,
        object_id=draw(st.sampled_from(objects)) if kind is VmaKind.SHARED else 0,
        vm_flags=draw(flag_sets),
        name=draw(st.sampled_from(["", "[heap]", "[stack]"]) | names),
        huge_pages=draw(st.sampled_from([0, 512])),
        reserved=kind is VmaKind.ANON and draw(st.booleans()),
    )


_MM_NUMBERS = (
    "start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "arg_start", "arg_end", "env_start",
    "env_end",
)  # fmt: skip


mm_flags = st.builds(
    MmFlags,
    st.booleans(),
    st.sampled_from([0, 2]),
    st.integers(0, 3),
    st.booleans(),
    st.none() | st.integers(0, 0x1FF),
)


@st.composite
def address_spaces(
    draw: st.DrawFn, files: tuple[int, ...], regular: tuple[int, ...], objects: tuple[int, ...]
) -> Mm:
    mapped, start = [], 0x10000
    for _ in range(draw(st.integers(0, 6))):
        start += draw(st.integers(0, 1)) * PAGE
        mapped.append(draw(vmas(start, regular, objects)))
        start = mapped[-1].end
    fields = draw(numbers("<10Q"))
    return Mm(
        **dict(zip(_MM_NUMBERS, fields, strict=True)),
        start_stack=draw(st.sampled_from([0x10000, 0x11000, 0x13000])),
        auxv=draw(tuples_of(u64, 6)),
        exe_id=draw(st.sampled_from(files)),
        dumpable=draw(st.integers(0, 2)),
        vmas=tuple(mapped),
        vdso_build_id=draw(st.binary(max_size=20)),
        future_locks=draw(st.sampled_from([0, 2, 6])),
        flags=draw(mm_flags),
    )  # fmt: skip


@st.composite
def extents(draw: st.DrawFn, limit: int = 40) -> tuple[Extent, ...]:
    """Merged extents of up to some thousand pages, in_parent only where the pages are not eager in some way."""
    found, addr = [], draw(st.integers(0, 9)) * PAGE
    for _ in range(draw(st.integers(0, 4))):
        extent = Extent(addr, draw(st.integers(1, limit)), draw(st.booleans()), draw(st.booleans()))
        found.append(extent)
        addr = extent.end + draw(st.integers(0, 2)) * PAGE
    return merge(found)


# --- tasks --------------------------------------------------------------------------------------------------


@st.composite
def posix_timers(draw: st.DrawFn) -> PosixTimer:
    return PosixTimer(
        draw(u31), draw(st.integers(-9, 11)), draw(st.integers(0, 64)), draw(st.integers(0, 4)), draw(u64),
        draw(u31), draw(u31), draw(nanoseconds), draw(nanoseconds),
    )  # fmt: skip


@st.composite
def living(
    draw: st.DrawFn, vpid: int, ppid: int, files: tuple[int, ...], pools: Pools, regular: tuple[int, ...]
) -> Task:
    state = draw(st.sampled_from([TaskState.ALIVE, TaskState.STOPPED]))
    signals = draw(st.lists(st.sampled_from([1, 2, 10, 18, 20, 64]), unique=True).map(sorted))
    actions = [SigAction(signal, *draw(numbers("<4Q"))) for signal in signals]
    timers = draw(st.lists(st.integers(0, 2), unique=True).map(sorted))
    limits = (
        struct.iter_unpack("<QQ", draw(st.binary(min_size=256, max_size=256))) if draw(st.booleans()) else ()
    )
    tids = [vpid, *range(vpid + 1, vpid + 1 + draw(st.integers(0, 2)))]
    fds = draw(st.lists(st.integers(0, 1023), unique=True, max_size=4))
    return Task(
        vpid=vpid,
        ppid=ppid,
        pgid=draw(u31),
        sid=draw(u31),
        state=state,
        comm=draw(names),
        exit_signal=draw(st.integers(0, 64)),
        stop_signal=draw(st.integers(0, 64)),
        threads=tuple(draw(threads(tid)) for tid in tids),
        mm=draw(address_spaces(files, regular, tuple(pools.shared))),
        fs=Fs(draw(st.sampled_from(files)), draw(st.sampled_from(files)), draw(st.integers(0, 0o777))),
        # Everything open is held by somebody: here by the root.
        descriptors=tuple(
            Descriptor(fd, file_id, draw(st.booleans()))
            for fd, file_id in (
                list(enumerate(files, start=2000)) + [(fd, draw(st.sampled_from(files))) for fd in fds]
                if not ppid
                else [(fd, draw(st.sampled_from(files))) for fd in fds]
            )
        ),
        sigactions=tuple(action for action in actions if action != SigAction(action.signal, 0, 0, 0, 0)),
        pending=draw(siginfos),
        itimers=tuple(IntervalTimer(which, draw(st.integers(1, 2**60)), draw(nanoseconds)) for which in timers),
        posix_timers=draw(tuples_of(posix_timers(), 2)),
        limits=tuple(Limit(number, *pair) for number, pair in enumerate(limits)),
        personality=draw(u32),
        oom_score_adj=draw(st.integers(-1000, 1000)),
        loginuid=draw(u32),
        child_subreaper=draw(st.booleans()),
        mce_kill=draw(st.integers(0, 2)),
        membarriers=draw(st.integers(0, 0x1FF)),
        xfeatures=draw(st.sampled_from([0, 1 << 18])),
        cgroups=draw(st.dictionaries(names, paths, max_size=2)),
    )  # fmt: skip


@st.composite
def zombies(draw: st.DrawFn, vpid: int, ppid: int) -> Task:
    return Task(
        vpid, ppid, draw(u31), draw(u31), TaskState.ZOMBIE, draw(names), draw(u16), draw(st.integers(0, 64))
    )


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
    file_ids = tuple(draw(st.lists(st.integers(1, 2**20), unique=True, min_size=1, max_size=5)))
    drafts = draw(st.lists(st.integers(1, 2**31), unique=True, max_size=2))
    shared = {number: draw(shared_memory(number)) for number in drafts}
    pools = Pools(
        file_ids=file_ids,
        pipes={number: draw(pipes(number)) for number in draw(st.lists(u32, unique=True, max_size=2))},
        shared=shared,
        contents={
            number: draw(contents_of(number)) for number in draw(st.lists(ids, unique=True, max_size=2))
        },
    )
    files = with_slaves({number: draw(open_files(number, pools)) for number in file_ids})
    used = {file.resource.pipe_id for file in files.values() if isinstance(file.resource, PipeEnd)}
    regular = tuple(number for number, file in files.items() if isinstance(file.resource, RegularFile))
    tasks = [draw(living(1, 0, file_ids, pools, regular))]
    for vpid in range(10, 10 * (1 + draw(st.integers(0, 2))), 10):
        parent = draw(st.sampled_from([task.vpid for task in tasks if task.mm]))
        kind = (
            living(vpid, parent, file_ids, pools, regular) if draw(st.booleans()) else zombies(vpid, parent)
        )
        tasks.append(draw(kind))
    objects = [MemoryObject(ObjectKind.TASK, task.vpid) for task in tasks if task.mm]
    objects += [MemoryObject(ObjectKind.SHARED, number) for number in shared]
    memory = {obj: draw(extents()) for obj in objects}
    return Checkpoint(
        tasks=tuple(tasks),
        files=files,
        pipes={number: pipe for number, pipe in pools.pipes.items() if number in used},
        shared=shared,
        contents=pools.contents,
        memory={obj: runs for obj, runs in memory.items() if runs},
        clocks=Clocks(draw(nanoseconds), draw(nanoseconds), draw(nanoseconds)),
        held=draw(st.sampled_from(["", "dump_0123456789abcdef"])),
        hostname=draw(names),
    )
