"""Reading open files: files.img, fdinfo-*, pipes-data, fifo-data (CRIU 4.2: images/fdinfo.proto)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

from lazyproc.errors import ImageError
from lazyproc.facts import replace
from lazyproc.images import sockets
from lazyproc.images.contents import REMAPS, read_remaps
from lazyproc.images.extras import Extras
from lazyproc.images.files import FILES, garbled, records, to_text
from lazyproc.images.memory import SharedTable
from lazyproc.images.openfiles import FD_CLOEXEC, MEMBERS
from lazyproc.images.pb import files_pb2 as pb
from lazyproc.images.pb import lazyproc_pb2 as own
from lazyproc.images.tasks import SECOND_NS
from lazyproc.images.terminals import TerminalReader
from lazyproc.model import (
    Descriptor,
    Epoll,
    EpollTarget,
    EventFd,
    InetSocket,
    Inotify,
    InotifyWatch,
    MemFd,
    OpenFile,
    Owner,
    Packet,
    Pipe,
    PipeEnd,
    RegularFile,
    Resource,
    SignalFd,
    TimerFd,
    UnixSocket,
)

_DEFAULT_PIPE = 65536  # bytes, of a pipe that nobody resized
_MOST_DESCRIPTORS = (1 << 31) - 64  # sysctl_nr_open_max of fs/file.c
_OWNERS, _SIGNALS = 3, 64  # F_OWNER_*, from 0 on; from 1 on


class FileReader:
    """Reads files.img and what hangs on it. The caller says which files the descriptor tables hold."""

    def __init__(self, images: Mapping[str, bytes], extras: Extras, shared: SharedTable) -> None:
        self._images = images
        self._extras = extras
        self._shared = shared
        self._entries: dict[int, pb.file_entry] = {}
        self._outside: dict[int, bytes] = {}  # names of unix sockets that are not in the tree, by inode
        for entry, reader in records(images, FILES, pb.file_entry):
            if entry.type not in MEMBERS or MEMBERS[entry.type] not in {
                field.name for field, _ in entry.ListFields()
            }:
                raise ImageError(
                    f"file {entry.id} is a {pb.fd_types.Name(entry.type)}, which lazyproc does not restore",
                    where=reader.name,
                    remedy="restore it with criu",
                )
            if entry.type == pb.UNIXSK and entry.usk.uflags == sockets.EXTERNAL:
                name = entry.usk.name
                self._outside[entry.usk.ino] = name.rstrip(b"\0") if name.startswith(b"/") else name
                continue
            self._entries[entry.id] = entry
        self._remaps = read_remaps(records(images, REMAPS, pb.remap_file_path_entry))
        self._queues = sockets.read_queues(images, extras)
        self._terminals = TerminalReader(images)
        self._pipe_data = {name: self._read_pipe_data(name) for name in ("pipes-data.img", "fifo-data.img")}
        self._fifo_ids = self._number_fifos()

    def memfd_files(self) -> dict[int, int]:
        """The shared object of each MEMFD file."""
        return {
            entry.id: self._shared.of_inode(entry.memfd.inode_id)
            for entry in self._entries.values()
            if entry.type == pb.MEMFD
        }

    def read_descriptors(self, name: str) -> tuple[Descriptor, ...]:
        descriptors = []
        for entry, reader in records(self._images, name, pb.fdinfo_entry):
            if entry.id not in self._entries:
                raise reader.error(f"descriptor {entry.fd} is of the missing file {entry.id}")
            if entry.fd >= _MOST_DESCRIPTORS:
                raise reader.error(f"fd is {entry.fd}, which no descriptor can be")
            descriptors.append(Descriptor(entry.fd, entry.id, bool(entry.flags & FD_CLOEXEC)))
        return tuple(descriptors)

    def read_files(self, tables: Sequence[tuple[Descriptor, ...]]) -> dict[int, OpenFile]:
        """Every open file by id, but for the helpers: paths of FIFOs, memfds that only mappings hold."""
        helpers = {_path_id(entry) for entry in self._entries.values()}
        files = {
            entry.id: self._read_file(entry) for entry in self._entries.values() if entry.id not in helpers
        }
        files = _resolve_epolls(files, tables, self._extras)
        files = _resolve_pending(files, self._extras)
        held = _held(files.values(), tables)
        return {
            number: file
            for number, file in files.items()
            if not isinstance(file.resource, MemFd) or number in held
        }

    def read_pipes(self) -> dict[int, Pipe]:
        """Every pipe and FIFO, those included that have no data."""
        pipes = {}
        for entry in self._entries.values():
            if entry.type == pb.PIPE:
                pipes[entry.pipe.pipe_id] = self._pipe(
                    "pipes-data.img", entry.pipe.pipe_id, entry.pipe.pipe_id, ""
                )
            elif entry.type == pb.FIFO:
                file = self._path_of(entry)
                # Nobody can come to one that was removed by its name: a pipe does.
                path = "" if file.id in self._remaps else to_text(file.name, FILES)
                number = self._fifo_ids[entry.fifo.pipe_id]
                pipes[number] = self._pipe("fifo-data.img", entry.fifo.pipe_id, number, path)
        return pipes

    def _number_fifos(self) -> dict[int, int]:
        """A FIFO's pipe_id is an inode of its file system, which may be a pipe's inode too."""
        taken = {entry.pipe.pipe_id for entry in self._entries.values() if entry.type == pb.PIPE}
        numbers = {}
        for entry in self._entries.values():
            if entry.type == pb.FIFO and entry.fifo.pipe_id not in numbers:
                number = entry.fifo.pipe_id
                while number in taken:
                    number += 1
                numbers[entry.fifo.pipe_id] = number
                taken.add(number)
        return numbers

    def _path_of(self, entry: pb.file_entry) -> pb.reg_file_entry:
        path = self._entries.get(_path_id(entry))
        if path is None or path.type != pb.REG:
            raise garbled(FILES, f"the path of file {entry.id} is missing")
        return path.reg

    def _read_pipe_data(self, name: str) -> dict[int, tuple[int, bytes]]:
        """Capacity and data of each pipe."""
        return {
            entry.pipe_id: (entry.size if entry.HasField("size") else _DEFAULT_PIPE, reader.raw(entry.bytes))
            for entry, reader in records(self._images, name, pb.pipe_data_entry)
        }

    def _pipe(self, name: str, stored_id: int, number: int, path: str) -> Pipe:
        capacity, data = self._pipe_data[name].get(stored_id, (_DEFAULT_PIPE, b""))
        extra = self._extras.pipes.get(stored_id)
        return Pipe(number, capacity, data, path, tuple(extra.packets) if extra else ())

    def _read_file(self, entry: pb.file_entry) -> OpenFile:
        member = self._path_of(entry) if entry.type == pb.FIFO else getattr(entry, MEMBERS[entry.type])
        owner = member.fown
        extra = self._extras.files.get(entry.id, own.FileExtra(id=entry.id))
        return OpenFile(
            id=entry.id,
            flags=member.flags,
            pos=member.pos if entry.type in (pb.REG, pb.MEMFD, pb.FIFO) else 0,
            owner=_read_owner(owner, f"{FILES}, file {entry.id}"),
            resource=self._read_resource(entry, extra),
            outside=extra.outside or entry.reg.ext or sockets.has_to_be_given(entry.usk, self._outside),
        )

    def _read_resource(self, entry: pb.file_entry, extra: own.FileExtra) -> Resource:
        queue: tuple[Packet, ...] = self._queues.get(entry.id, ())
        if entry.type == pb.PIPE:
            return PipeEnd(entry.pipe.pipe_id)
        if entry.type == pb.FIFO:
            return PipeEnd(self._fifo_ids[entry.fifo.pipe_id])
        if entry.type == pb.UNIXSK:
            return sockets.read_unix(entry.usk, extra, queue, self._outside)
        if entry.type == pb.INETSK:
            return sockets.read_inet(entry.isk, extra, queue, self._images)
        if entry.type == pb.NETLINKSK:
            return sockets.read_netlink(entry.nlsk, extra)
        if entry.type == pb.TTY:
            return self._terminals.read(entry.tty, to_text(self._path_of(entry).name, FILES), extra)
        if entry.type == pb.EVENTFD:
            return EventFd(entry.efd.counter, extra.semaphore)
        if entry.type == pb.EVENTPOLL:
            return _read_epoll(entry.epfd, extra)
        if entry.type == pb.TIMERFD:
            return _read_timerfd(entry.tfd)
        if entry.type == pb.SIGNALFD:
            return SignalFd(entry.sgfd.sigmask)
        if entry.type == pb.MEMFD:
            return MemFd(self._shared.of_inode(entry.memfd.inode_id))
        if entry.type == pb.INOTIFY:
            return _read_inotify(entry.ify)
        return self._read_regular(entry.reg, extra)

    def _read_regular(self, entry: pb.reg_file_entry, extra: own.FileExtra) -> RegularFile:
        build_id = struct.pack(f"<{len(entry.build_id)}I", *entry.build_id)
        return RegularFile(
            path=to_text(entry.name, FILES),
            mode=entry.mode,
            size=extra.size if extra.HasField("size") else entry.size,
            mtime_ns=extra.mtime_ns,
            build_id=extra.build_id if extra.HasField("build_id") else build_id,
            content_id=extra.content_id or self._remaps.get(entry.id, 0),
            rdev=extra.rdev,
        )


def _path_id(entry: pb.file_entry) -> int:
    """Of the file that has the path of a FIFO or a terminal; 0 of others."""
    return entry.tty.regf_id if entry.type == pb.TTY else entry.fifo.regf_id


def _read_owner(entry: pb.fown_entry, where: str) -> Owner:
    """fcntl(2) takes no others (fs/fcntl.c)."""
    if entry.signum > _SIGNALS:
        raise garbled(where, f"fown.signum is {entry.signum}, which is no signal")
    if entry.pid_type >= _OWNERS or entry.pid >> 31:
        raise garbled(where, f"fown.pid is {entry.pid} of pid_type {entry.pid_type}, which cannot own a file")
    return Owner(entry.pid, entry.pid_type, entry.signum, entry.uid, entry.euid)


def _read_epoll(entry: pb.eventpoll_file_entry, extra: own.FileExtra) -> Epoll:
    for said in (extra.epoll_files, extra.epoll_fds):
        if said and len(said) != len(entry.tfd):
            raise garbled(FILES, f"epoll file {entry.id} has {len(entry.tfd)} targets, not {len(said)}")
    watched = extra.epoll_files or [0] * len(entry.tfd)
    numbers = extra.epoll_fds or [target.tfd for target in entry.tfd]
    return Epoll(
        tuple(
            EpollTarget(fd, file_id, target.events, target.data)
            for target, fd, file_id in zip(entry.tfd, numbers, watched, strict=True)
        )
    )


def _read_timerfd(entry: pb.timerfd_entry) -> TimerFd:
    return TimerFd(
        clock=entry.clockid,
        settime_flags=entry.settime_flags,
        ticks=entry.ticks,
        value_ns=entry.vsec * SECOND_NS + entry.vnsec,
        interval_ns=entry.isec * SECOND_NS + entry.insec,
    )


def _read_inotify(entry: pb.inotify_file_entry) -> Inotify:
    if not all(watch.f_handle.HasField("path") for watch in entry.wd):
        raise ImageError(
            f"inotify file {entry.id} watches by file handle, not by path",
            where=FILES,
            remedy="dump with criu --force-irmap, or restore with criu",
        )
    return Inotify(
        tuple(InotifyWatch(watch.wd, to_text(watch.f_handle.path, FILES), watch.mask) for watch in entry.wd)
    )


# --- what CRIU leaves to be found out -----------------------------------------------------------------------


def _resolve_epolls(
    files: dict[int, OpenFile], tables: Sequence[tuple[Descriptor, ...]], extras: Extras
) -> dict[int, OpenFile]:
    """CRIU's epoll targets have only a number: that of a descriptor of the task that holds the epoll file."""
    resolved = dict(files)
    for number, file in files.items():
        if not isinstance(file.resource, Epoll) or number in extras.files:
            continue
        table = next((table for table in tables if any(item.file_id == number for item in table)), ())
        by_fd = {item.fd: item.file_id for item in table}
        missing = [target.fd for target in file.resource.targets if target.fd not in by_fd]
        if missing:
            raise garbled(FILES, f"epoll file {number} watches descriptor {missing[0]}, which nobody holds")
        targets = (replace(target, file_id=by_fd[target.fd]) for target in file.resource.targets)
        resolved[number] = replace(file, resource=Epoll(tuple(targets)))
    return resolved


def _resolve_pending(files: dict[int, OpenFile], extras: Extras) -> dict[int, OpenFile]:
    """In CRIU's images a connection not yet accepted has its listening socket as the peer."""
    foreign = {
        number: file.resource
        for number, file in files.items()
        if isinstance(file.resource, UnixSocket) and number not in extras.files
    }
    waiting = sockets.join_pending(foreign)
    resolved = dict(files)
    for number, socket in foreign.items():
        if socket.inode in waiting:
            resolved[number] = replace(files[number], resource=replace(socket, pending=waiting[socket.inode]))
        elif any(socket.inode in inodes for inodes in waiting.values()):
            resolved[number] = replace(files[number], resource=replace(socket, peer=0))
    return resolved


def _held(files: Iterable[OpenFile], tables: Sequence[tuple[Descriptor, ...]]) -> set[int]:
    """The files that a descriptor, an epoll set or a packet under way holds."""
    held = {item.file_id for table in tables for item in table}
    for file in files:
        match file.resource:
            case Epoll(targets):
                held |= {target.file_id for target in targets}
            case UnixSocket() | InetSocket():
                held |= {file_id for packet in file.resource.queue for file_id in packet.file_ids}
            case _:
                pass
    return held
