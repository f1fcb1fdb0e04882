"""What a running tree will need of the host that takes it in: files, addresses, names, numbers, features."""

from __future__ import annotations

import mmap
import os
import resource
import socket
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress

from lazyproc.dump.files import LINKS, gather_link, gather_mapped_file, is_zero_device
from lazyproc.dump.mappings import SYSV_PREFIX
from lazyproc.dump.memory import kind_of, refusal, vma_of
from lazyproc.dump.registry import Refused, Registry
from lazyproc.dump.space import Space
from lazyproc.dump.survey import ProcessFacts, TreeFacts
from lazyproc.dump.threads import credentials
from lazyproc.errors import NoSuchProcess
from lazyproc.kernel import proc, sysvipc
from lazyproc.kernel.netfilter import plain
from lazyproc.kernel.sockopt import EARLY, FREEBIND, TCP_CLOSE
from lazyproc.model import (
    InetSocket,
    Inotify,
    NetlinkSocket,
    OpenFile,
    PipeEnd,
    RegularFile,
    TerminalMaster,
    UnixSocket,
    VmaKind,
)
from lazyproc.needs import (
    AddressNeed,
    FeatureNeed,
    FifoNeed,
    GroupNeed,
    InterfaceNeed,
    LimitNeed,
    NameNeed,
    Need,
    NetlinkNeed,
    PathNeed,
    PidNeed,
    PlaceNeed,
    PrivilegeNeed,
    SegmentNeed,
    SocketFileNeed,
    TerminalNeed,
    UserNeed,
    Wanted,
    credential_needs,
    file_need,
    limit_needs,
    tree_need,
)

SHARED_PREFIXES = (SYSV_PREFIX, "/dev/zero")
_CONGESTION = (socket.IPPROTO_TCP, socket.TCP_CONGESTION)  # may be a kernel module

Place = tuple[int, str]  # pid, and "fd 7" or the like


def needs_of(registry: Registry, facts: TreeFacts) -> Iterator[Wanted]:
    """Each need once, with the first place that has it. `registry` has the descriptors of the tree, without contents;
    mapped files are added to it, and what stands in their way.
    """
    places: dict[int, Place] = {}
    private: set[int] = set()
    alive = [process for process in facts.processes if process.alive and process.pid != facts.our_pid]
    for process in alive:
        _look_at_files(registry, process, places, private)
    seen: dict[Need, Place] = {}
    for need, place in _every(registry, alive, facts, places, private):
        seen.setdefault(need, place)
    for need, (pid, where) in seen.items():
        yield Wanted(need, pid, where)


def limits_of(registry: Registry, spaces: Mapping[int, Space]) -> Iterator[Wanted]:
    """Of each limit what the process takes that takes most: they hold for each by itself. And of who restores the tree
    what all of them have open.
    """
    most: dict[str, tuple[int, int]] = {}
    highest = registry.highest_descriptors()
    for pid, space in spaces.items():
        files = {number for _, number in space.files}
        for need in limit_needs(space.vmas, highest.get(pid, -1), len(files) + len(objects_of(space))):
            most[need.name] = max(most.get(need.name, (0, 0)), (need.value, pid))
    for name, (value, pid) in most.items():
        yield Wanted(LimitNeed(name, value), pid, "process")
    objects = set[object]().union(*map(objects_of, spaces.values()))
    yield Wanted(tree_need(len(registry.files) + len(objects), len(spaces)), registry.tasks[0].pid, "tree")


def objects_of(space: Space) -> set[object]:
    """The shared objects that are mapped there, by device and inode."""
    return {space.entries[at][4:6] for at in space.objects}


def _every(
    registry: Registry,
    alive: Collection[ProcessFacts],
    facts: TreeFacts,
    places: Mapping[int, Place],
    private: Collection[int],
) -> Iterator[tuple[Need, Place]]:
    yield from _of_files(registry, places, private)
    for content in registry.contents.values():
        if content.path:
            yield PlaceNeed(content.path, content.mode), (facts.root.pid, f"file {content.path}")
        if not stat.S_ISDIR(content.mode):
            for owner in UserNeed(content.uid), GroupNeed(content.gid):
                yield owner, (facts.root.pid, f"file {content.path or content.id}")
    for process in facts.processes:
        yield PidNeed(process.vpid), (process.pid, "process")
        for thread in process.threads:
            yield PidNeed(thread.vtid), (process.pid, f"thread {thread.tid}")
    for process in alive:
        yield from _of_memory(process)
        yield from _of_users(process)
        # One that is lower ends it, sooner or later; the others make calls fail, as programs know it.
        yield LimitNeed("cpu", process.limits[resource.RLIMIT_CPU][1]), (process.pid, "process")
        with suppress(NoSuchProcess):
            if proc.timers(proc.read(process.pid, "timers")):
                yield FeatureNeed("POSIX timers"), (process.pid, "process")


def _look_at_files(
    registry: Registry, process: ProcessFacts, places: dict[int, Place], private: set[int]
) -> None:
    """Mapped files, the program, and directories, into `registry`; where they are into `places` by file id."""
    pid = process.pid
    for name in LINKS:
        places.setdefault(gather_link(registry, pid, name), (pid, name))
    for smaps in process.smaps:
        entry = smaps.entry
        try:
            kind = kind_of(entry)
            refusal(smaps, kind)
        except Refused:  # an obstacle already
            continue
        if kind is VmaKind.FILE and entry.path != "[vsyscall]":
            try:
                if is_zero_device(pid, entry):
                    continue
                number = gather_mapped_file(registry, pid, entry.start, entry.end, entry)
            except PermissionError:  # map_files is root's, which `lazyproc check` says and the dump will
                continue
            places.setdefault(number, (pid, f"mapping {entry.start:#x}-{entry.end:#x}"))
            if vma_of(smaps).flags & mmap.MAP_PRIVATE:
                private.add(number)


def _of_files(
    registry: Registry, places: Mapping[int, Place], private: Collection[int]
) -> Iterator[tuple[Need, Place]]:
    written = {
        file.resource.path
        for file in registry.files.values()
        if isinstance(file.resource, RegularFile) and file.flags & os.O_ACCMODE != os.O_RDONLY
    }
    connections = {
        (plain(inet.local), plain(inet.remote))
        for inet in (file.resource for file in registry.files.values())
        if isinstance(inet, InetSocket) and inet.remote and inet.protocol == socket.IPPROTO_TCP
    }
    for number, file in registry.files.items():
        place = places.get(number) or _descriptor(registry, number)
        match file.resource:
            case RegularFile(content_id=0) as regular:
                # One that the tree itself may still write to can have another size by the time it is frozen.
                sized = number in private and regular.path not in written
                if not _comes_with_the_tree(regular.path):
                    yield file_need(regular, file.flags, sized=sized), place
            case InetSocket() as inet:
                for need in _of_inet(inet, connections):
                    yield need, place
            case _:
                for need in _of_others(registry, file):
                    yield need, place


def _comes_with_the_tree(path: str) -> bool:
    """What describes a process of it is not there before it is; of others it has been refused."""
    return path.startswith("/proc/") and path.split("/")[2].isdigit()


def _descriptor(registry: Registry, number: int) -> Place:
    place = registry.place(number)
    return place.pid, f"fd {place.fd}"


def _of_others(registry: Registry, file: OpenFile) -> Iterator[Need]:
    match file.resource:
        case PipeEnd(pipe_id):
            if path := registry.pipes[pipe_id].path:
                yield FifoNeed(path)
        case Inotify(watches):
            yield from (PathNeed(watch.path) for watch in watches)
        case NetlinkSocket(protocol=protocol, port=port) if port:
            yield NetlinkNeed(protocol, port)
        case TerminalMaster(number=number, path=path):
            yield TerminalNeed(path, number)
        case UnixSocket() as unix if unix.bound_here:
            if unix.path:
                yield SocketFileNeed(unix.path)
            elif unix.name.startswith(b"\0"):
                yield NameNeed(unix.name, int(unix.type))


def _of_inet(
    inet: InetSocket, connections: Collection[tuple[tuple[bytes, int], tuple[bytes, int]]]
) -> Iterator[Need]:
    """A connection shares its port with anybody (repair mode), and so does one that has ended."""
    for name in (*(each.interface for each in inet.memberships), *(each.interface for each in inet.ties)):
        yield InterfaceNeed(name)
    if inet.local[1]:
        yield PrivilegeNeed("port", inet.local[1])
    tcp = inet.protocol == socket.IPPROTO_TCP
    shares = tcp and (inet.remote is not None or (inet.state == TCP_CLOSE and bool(inet.shutdown)))
    host, port = inet.local
    if port and (any(host) or not shares):
        free = {option: b"\1\0\0\0" for option in FREEBIND if inet.absent and option in inet.options.values}
        options = tuple(
            (level, name, value)
            for (level, name), value in sorted({**inet.options.values, **free}.items())
            if (level, name) in EARLY or (level, name) == _CONGESTION
        )
        yield AddressNeed(
            int(inet.family),
            int(inet.type),
            inet.protocol,
            host,
            0 if shares else port,
            inet.interface,
            options,
        )
    if tcp and inet.remote is not None:
        yield FeatureNeed("TCP_REPAIR")
        if (plain(inet.remote), plain(inet.local)) not in connections:
            yield FeatureNeed("nftables")


def _of_users(process: ProcessFacts) -> Iterator[tuple[Need, Place]]:
    """As whom its threads run. Securebits nobody but a thread itself can see: the images will tell."""
    with suppress(NoSuchProcess, OSError):
        chroot = os.readlink(f"/proc/{process.pid}/root") != "/"
        for thread in process.threads:
            status = proc.status(proc.read(process.pid, f"task/{thread.tid}/status"))
            filtered = bool(status.seccomp)
            for need in credential_needs(credentials(status, 0), filtered=filtered, chroot=chroot):
                yield need, (process.pid, f"thread {thread.tid}")


def _of_memory(process: ProcessFacts) -> Iterator[tuple[Need, Place]]:
    """Shared memory, which a restore opens by way of a mapping of its own."""
    shared = [e.entry for e in process.smaps if e.entry.deleted and e.entry.path.startswith(SHARED_PREFIXES)]
    segments = sysvipc.segments() if any(e.path.startswith(SYSV_PREFIX) for e in shared) else {}
    for entry in shared:
        place = process.pid, f"mapping {entry.start:#x}-{entry.end:#x}"
        yield FeatureNeed("map_files"), place
        if entry.path.startswith(SYSV_PREFIX) and (segment := segments.get(entry.inode)):
            yield SegmentNeed(segment.key, segment.id), place
