"""Open files: files.img, fdinfo-*, pipes-data and fifo-data (CRIU 4.2: images/fdinfo.proto)."""

from __future__ import annotations

import stat
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from lazyproc.errors import ImageError
from lazyproc.images import sockets
from lazyproc.images.contents import REMAPS, read_remaps
from lazyproc.images.extras import Extras
from lazyproc.images.files import ImageWriter, garbled, records, to_bytes, to_text
from lazyproc.images.memory import SharedTable
from lazyproc.images.pb import files_pb2 as pb
from lazyproc.images.pb import lazyproc_pb2 as own
from lazyproc.model import (
    Checkpoint,
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
    SharedKind,
    SignalFd,
    TimerFd,
    UnixSocket,
)

FILES = "files.img"
_SECOND_NS = 1_000_000_000
_O_RDWR_LARGEFILE = 0o100002
_FD_CLOEXEC = 1
_DEFAULT_PIPE = 65536
_TYPES = {
    RegularFile: pb.REG,
    InetSocket: pb.INETSK,
    UnixSocket: pb.UNIXSK,
    EventFd: pb.EVENTFD,
    Epoll: pb.EVENTPOLL,
    TimerFd: pb.TIMERFD,
    SignalFd: pb.SIGNALFD,
    MemFd: pb.MEMFD,
    Inotify: pb.INOTIFY,
}
# The member of file_entry that goes with each type.
_MEMBERS = {
    pb.REG: "reg", pb.PIPE: "pipe", pb.FIFO: "fifo", pb.INETSK: "isk", pb.UNIXSK: "usk", pb.EVENTFD: "efd",
    pb.EVENTPOLL: "epfd", pb.INOTIFY: "ify", pb.SIGNALFD: "sgfd", pb.TIMERFD: "tfd", pb.MEMFD: "memfd",
}  # fmt: skip


def _type_of(file: OpenFile, pipes: Mapping[int, Pipe]) -> pb.fd_types.ValueType:
    if isinstance(file.resource, PipeEnd):
        return pb.FIFO if pipes[file.resource.pipe_id].path else pb.PIPE
    return _TYPES[type(file.resource)]


# --- writing ------------------------------------------------------------------------------------------------


class FileWriter:
    """Writes files.img and what hangs on it."""

    def __init__(self, checkpoint: Checkpoint, writer: ImageWriter, extras: own.Extras) -> None:
        self._checkpoint = checkpoint
        self._writer = writer
        self._extras = extras
        self._next_id = max(checkpoint.files, default=0) + 1
        self._listeners = sockets.accept_listeners(
            file.resource for file in checkpoint.files.values() if isinstance(file.resource, UnixSocket)
        )

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def write_files(self) -> None:
        writer = self._writer
        writer.create(FILES)
        for file in self._checkpoint.files.values():
            kind = _type_of(file, self._checkpoint.pipes)
            entry = pb.file_entry(type=kind, id=file.id)
            member = getattr(entry, _MEMBERS[kind])
            member.id = file.id
            extra = own.FileExtra(id=file.id)
            if kind != pb.FIFO:
                _write_owner(file.owner, member.fown)
                member.flags = file.flags
            self._write_resource(file, entry, extra)
            writer.add(FILES, entry)
            if len(extra.ListFields()) > 1:
                self._extras.files.append(extra)

    def write_memfds(self) -> dict[int, int]:
        """A MEMFD file for the mappings of every shared object; the file's id by the object's."""
        ids = {}
        for memory in self._checkpoint.shared.values():
            if memory.kind is not SharedKind.SYSV:
                ids[memory.id] = self._new_id()
                entry = pb.file_entry(type=pb.MEMFD, id=ids[memory.id])
                entry.memfd.id, entry.memfd.flags, entry.memfd.pos = ids[memory.id], _O_RDWR_LARGEFILE, 0
                entry.memfd.inode_id = memory.id
                _write_owner(Owner(), entry.memfd.fown)
                self._writer.add(FILES, entry)
        return ids

    def _write_resource(self, file: OpenFile, entry: pb.file_entry, extra: own.FileExtra) -> None:
        match file.resource:
            case RegularFile() as regular:
                self._write_regular(file, regular, entry.reg, extra)
            case PipeEnd(pipe_id):
                self._write_pipe_end(file, self._checkpoint.pipes[pipe_id], entry)
            case UnixSocket() as socket:
                sockets.write_unix(file, socket, self._listeners, entry.usk, extra)
                sockets.write_queue(file.id, socket.queue, self._writer, self._extras)
            case InetSocket() as socket:
                sockets.write_inet(file, socket, entry.isk, extra, self._writer)
                sockets.write_queue(file.id, socket.queue, self._writer, self._extras)
            case EventFd(count, semaphore):
                entry.efd.counter = count
                if semaphore:
                    extra.semaphore = True
            case Epoll(targets):
                _write_epoll(targets, entry.epfd, extra)
            case TimerFd() as timer:
                _write_timerfd(timer, entry.tfd)
            case SignalFd(mask):
                entry.sgfd.sigmask = mask
            case MemFd(object_id):
                entry.memfd.inode_id, entry.memfd.pos = object_id, file.pos
            case Inotify(watches):
                for watch in watches:
                    message = entry.ify.wd.add(id=file.id, i_ino=0, mask=watch.mask, ignored_mask=0, s_dev=0)
                    message.wd = watch.wd
                    message.f_handle.bytes = message.f_handle.type = 0
                    message.f_handle.path = to_bytes(watch.path)

    def _write_regular(
        self, file: OpenFile, regular: RegularFile, entry: pb.reg_file_entry, extra: own.FileExtra
    ) -> None:
        entry.pos, entry.name, entry.mode = file.pos, to_bytes(regular.path), regular.mode
        if stat.S_ISREG(regular.mode):
            entry.size = regular.size
        elif regular.size:
            extra.size = regular.size
        if len(regular.build_id) % 4:
            extra.build_id = regular.build_id
        padded = regular.build_id.ljust(-(-len(regular.build_id) // 4) * 4, b"\0")
        entry.build_id.extend(struct.unpack(f"<{len(padded) // 4}I", padded))
        if regular.mtime_ns:
            extra.mtime_ns = regular.mtime_ns
        if regular.rdev:
            extra.rdev = regular.rdev
        if regular.content_id and self._checkpoint.contents[regular.content_id].path:
            extra.content_id = regular.content_id

    def _write_pipe_end(self, file: OpenFile, pipe: Pipe, entry: pb.file_entry) -> None:
        if not pipe.path:
            entry.pipe.pipe_id = pipe.id
            return
        # CRIU keeps path, flags and owner of a FIFO in a file of its own (criu/fifo.c, dump_one_fifo).
        path = pb.file_entry(type=pb.REG, id=self._new_id())
        entry.fifo.pipe_id, entry.fifo.regf_id = pipe.id, path.id
        path.reg.id, path.reg.flags, path.reg.pos, path.reg.name = (
            path.id,
            file.flags,
            file.pos,
            to_bytes(pipe.path),
        )
        _write_owner(file.owner, path.reg.fown)
        self._writer.add(FILES, path)

    def write_pipes(self) -> None:
        """What lies in pipes and FIFOs, empty ones too for their capacity."""
        for pipe in self._checkpoint.pipes.values():
            entry = pb.pipe_data_entry(pipe_id=pipe.id, bytes=len(pipe.data), size=pipe.capacity)
            self._writer.add("fifo-data.img" if pipe.path else "pipes-data.img", entry, pipe.data)
            if pipe.packets:
                self._extras.pipes.add(id=pipe.id, packets=pipe.packets)

    def write_descriptors(self, name: str, descriptors: Iterable[Descriptor]) -> None:
        """One descriptor table."""
        self._writer.create(name)
        for descriptor in descriptors:
            kind = _type_of(self._checkpoint.files[descriptor.file_id], self._checkpoint.pipes)
            flags = _FD_CLOEXEC if descriptor.cloexec else 0
            self._writer.add(
                name, pb.fdinfo_entry(id=descriptor.file_id, flags=flags, type=kind, fd=descriptor.fd)
            )


def _write_owner(owner: Owner, entry: pb.fown_entry) -> None:
    entry.pid, entry.pid_type, entry.signum = owner.pid, owner.type, owner.signal
    entry.uid, entry.euid = owner.uid, owner.euid


def _write_epoll(
    targets: Iterable[EpollTarget], entry: pb.eventpoll_file_entry, extra: own.FileExtra
) -> None:
    for target in targets:
        entry.tfd.add(id=0, tfd=target.fd, events=target.events, data=target.data)
        extra.epoll_files.append(target.file_id)


def _write_timerfd(timer: TimerFd, entry: pb.timerfd_entry) -> None:
    entry.clockid, entry.ticks, entry.settime_flags = timer.clock, timer.ticks, timer.settime_flags
    entry.vsec, entry.vnsec = divmod(timer.value_ns, _SECOND_NS)
    entry.isec, entry.insec = divmod(timer.interval_ns, _SECOND_NS)


# --- reading ------------------------------------------------------------------------------------------------


class FileReader:
    """Reads files.img and what hangs on it. The caller says which files the descriptor tables hold."""

    def __init__(self, images: Mapping[str, bytes], extras: Extras, shared: SharedTable) -> None:
        self._images = images
        self._extras = extras
        self._shared = shared
        self._entries: dict[int, pb.file_entry] = {}
        for entry, reader in records(images, FILES, pb.file_entry):
            if entry.type not in _MEMBERS or _MEMBERS[entry.type] not in {
                field.name for field, _ in entry.ListFields()
            }:
                raise ImageError(
                    f"file {entry.id} is a {pb.fd_types.Name(entry.type)}, which lazyproc does not restore",
                    where=reader.name,
                    remedy="restore it with criu",
                )
            self._entries[entry.id] = entry
        self._remaps = read_remaps(records(images, REMAPS, pb.remap_file_path_entry))
        self._queues = sockets.read_queues(images, extras)
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
            descriptors.append(Descriptor(entry.fd, entry.id, bool(entry.flags & _FD_CLOEXEC)))
        return tuple(descriptors)

    def read_files(self, tables: Sequence[tuple[Descriptor, ...]]) -> dict[int, OpenFile]:
        """Every open file by id, but for the helpers: paths of FIFOs, memfds that only mappings hold."""
        files = {
            entry.id: self._read_file(entry)
            for entry in self._entries.values()
            if entry.id not in self._helpers()
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
                path = to_text(self._path_of(entry).name, FILES)
                number = self._fifo_ids[entry.fifo.pipe_id]
                pipes[number] = self._pipe("fifo-data.img", entry.fifo.pipe_id, number, path)
        return pipes

    def _helpers(self) -> Collection[int]:
        return {entry.fifo.regf_id for entry in self._entries.values() if entry.type == pb.FIFO}

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
        path = self._entries.get(entry.fifo.regf_id if entry.fifo.HasField("regf_id") else entry.id)
        if path is None or path.type != pb.REG:
            raise garbled(FILES, f"the path of FIFO {entry.id} is missing")
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
        member = self._path_of(entry) if entry.type == pb.FIFO else getattr(entry, _MEMBERS[entry.type])
        owner = member.fown
        return OpenFile(
            id=entry.id,
            flags=member.flags,
            pos=member.pos if entry.type in (pb.REG, pb.MEMFD, pb.FIFO) else 0,
            owner=Owner(owner.pid, owner.pid_type, owner.signum, owner.uid, owner.euid),
            resource=self._read_resource(entry, self._extras.files.get(entry.id, own.FileExtra(id=entry.id))),
        )

    def _read_resource(self, entry: pb.file_entry, extra: own.FileExtra) -> Resource:
        queue: tuple[Packet, ...] = self._queues.get(entry.id, ())
        if entry.type == pb.PIPE:
            return PipeEnd(entry.pipe.pipe_id)
        if entry.type == pb.FIFO:
            return PipeEnd(self._fifo_ids[entry.fifo.pipe_id])
        if entry.type == pb.UNIXSK:
            return sockets.read_unix(entry.usk, extra, queue)
        if entry.type == pb.INETSK:
            return sockets.read_inet(entry.isk, extra, queue, self._images)
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
        if entry.ext:
            raise ImageError(f"file {entry.id} is external", where=FILES, remedy="restore it with criu")
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


def _read_epoll(entry: pb.eventpoll_file_entry, extra: own.FileExtra) -> Epoll:
    if extra.epoll_files and len(extra.epoll_files) != len(entry.tfd):
        raise garbled(
            FILES, f"epoll file {entry.id} has {len(entry.tfd)} targets, not {len(extra.epoll_files)}"
        )
    watched = extra.epoll_files or [0] * len(entry.tfd)
    return Epoll(
        tuple(
            EpollTarget(target.tfd, file_id, target.events, target.data)
            for target, file_id in zip(entry.tfd, watched, strict=True)
        )
    )


def _read_timerfd(entry: pb.timerfd_entry) -> TimerFd:
    return TimerFd(
        clock=entry.clockid,
        settime_flags=entry.settime_flags,
        ticks=entry.ticks,
        value_ns=entry.vsec * _SECOND_NS + entry.vnsec,
        interval_ns=entry.isec * _SECOND_NS + entry.insec,
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
