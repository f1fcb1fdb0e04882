"""Writing open files: files.img, fdinfo-*, pipes-data, fifo-data (CRIU 4.2: images/fdinfo.proto)."""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Mapping

from lazyproc.images import sockets
from lazyproc.images.files import FILES, ImageWriter, to_bytes
from lazyproc.images.pb import files_pb2 as pb
from lazyproc.images.pb import lazyproc_pb2 as own
from lazyproc.images.tasks import SECOND_NS
from lazyproc.images.terminals import info_id, slave_path, write_terminal
from lazyproc.model import (
    Checkpoint,
    Descriptor,
    Epoll,
    EpollTarget,
    EventFd,
    InetSocket,
    Inotify,
    MemFd,
    NetlinkSocket,
    OpenFile,
    Owner,
    Pipe,
    PipeEnd,
    RegularFile,
    SharedKind,
    SignalFd,
    TerminalMaster,
    TerminalSlave,
    TimerFd,
    UnixSocket,
)

_O_RDWR_LARGEFILE = 0o100002
FD_CLOEXEC = 1
_TYPES = {
    RegularFile: pb.REG,
    InetSocket: pb.INETSK,
    UnixSocket: pb.UNIXSK,
    NetlinkSocket: pb.NETLINKSK,
    EventFd: pb.EVENTFD,
    Epoll: pb.EVENTPOLL,
    TimerFd: pb.TIMERFD,
    SignalFd: pb.SIGNALFD,
    MemFd: pb.MEMFD,
    Inotify: pb.INOTIFY,
    TerminalMaster: pb.TTY,
    TerminalSlave: pb.TTY,
}
# The member of file_entry that goes with each type.
MEMBERS = {
    pb.REG: "reg", pb.PIPE: "pipe", pb.FIFO: "fifo", pb.INETSK: "isk", pb.UNIXSK: "usk", pb.EVENTFD: "efd",
    pb.EVENTPOLL: "epfd", pb.INOTIFY: "ify", pb.SIGNALFD: "sgfd", pb.TIMERFD: "tfd", pb.MEMFD: "memfd",
    pb.NETLINKSK: "nlsk", pb.TTY: "tty",
}  # fmt: skip


def _type_of(file: OpenFile, pipes: Mapping[int, Pipe]) -> pb.fd_types.ValueType:
    if isinstance(file.resource, PipeEnd):
        return pb.FIFO if pipes[file.resource.pipe_id].path else pb.PIPE
    return _TYPES[type(file.resource)]


class FileWriter:
    """Writes files.img and what hangs on it."""

    def __init__(self, checkpoint: Checkpoint, writer: ImageWriter, extras: own.Extras) -> None:
        self._checkpoint = checkpoint
        self._writer = writer
        self._extras = extras
        self._next_id = max(checkpoint.files, default=0) + 1
        resources = [file.resource for file in checkpoint.files.values()]
        self._masters = {each.number: each.path for each in resources if isinstance(each, TerminalMaster)}
        self._listeners = sockets.accept_listeners(
            resource for resource in resources if isinstance(resource, UnixSocket)
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
            member = getattr(entry, MEMBERS[kind])
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
                if file.outside:
                    extra.outside = True
            case UnixSocket() as socket:
                sockets.write_unix(file, socket, self._listeners, entry.usk, extra)
                if file.outside or socket.peer_name:
                    self._write_other_end(socket)
                sockets.write_queue(file.id, socket.queue, self._writer, self._extras)
            case InetSocket() as socket:
                sockets.write_inet(file, socket, entry.isk, extra, self._writer)
                sockets.write_queue(file.id, socket.queue, self._writer, self._extras)
            case NetlinkSocket() as socket:
                sockets.write_netlink(socket, entry.nlsk, extra)
            case EventFd(count, semaphore):
                entry.efd.counter = count
                if semaphore:
                    extra.semaphore = True
            case Epoll(targets):
                _write_epoll(targets, self._numbers_beside(file.id), entry.epfd, extra)
            case TimerFd() as timer:
                _write_timerfd(timer, entry.tfd)
            case SignalFd(mask):
                entry.sgfd.sigmask = mask
            case MemFd(object_id):
                entry.memfd.inode_id, entry.memfd.pos = object_id, file.pos
            case TerminalMaster() as terminal:
                entry.tty.tty_info_id = info_id(terminal.number, master=True)
                entry.tty.regf_id = self._write_path(file, terminal.path)
                write_terminal(terminal, self._writer, extra)
            case TerminalSlave(number):
                entry.tty.tty_info_id = info_id(number, master=False)
                entry.tty.regf_id = self._write_path(file, slave_path(self._masters[number], number))
            case Inotify(watches):
                for watch in watches:
                    message = entry.ify.wd.add(id=file.id, i_ino=0, mask=watch.mask, ignored_mask=0, s_dev=0)
                    message.wd = watch.wd
                    message.f_handle.bytes = message.f_handle.type = 0
                    message.f_handle.path = to_bytes(watch.path)

    def _numbers_beside(self, file_id: int) -> dict[int, int]:
        """File ids by number in the descriptor table that CRIU restores an epoll set in: the first that has it."""
        for task in self._checkpoint.tasks:
            table = {item.fd: item.file_id for item in task.descriptors}
            if file_id in table.values():
                return table
        return {}

    def _write_other_end(self, socket: UnixSocket) -> None:
        """Of a socket that leads out of the tree: CRIU writes it as a listening one (fix_external_unix_sockets)."""
        entry = pb.file_entry(type=pb.UNIXSK, id=self._new_id())
        sockets.write_external(socket, entry.id, entry.usk)
        _write_owner(Owner(), entry.usk.fown)
        self._writer.add(FILES, entry)

    def _write_regular(
        self, file: OpenFile, regular: RegularFile, entry: pb.reg_file_entry, extra: own.FileExtra
    ) -> None:
        entry.pos, entry.name, entry.mode = file.pos, to_bytes(regular.path), regular.mode
        if file.outside:
            entry.ext = True
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
        entry.fifo.pipe_id, entry.fifo.regf_id = pipe.id, self._write_path(file, pipe.path)

    def _write_path(self, file: OpenFile, path: str) -> int:
        """CRIU keeps path, flags and owner of FIFOs and terminals in files of their own (criu/fifo.c, dump_one_fifo).
        The id of that.
        """
        entry = pb.file_entry(type=pb.REG, id=self._new_id())
        reg = entry.reg
        reg.id, reg.flags, reg.pos, reg.name = entry.id, file.flags, file.pos, to_bytes(path)
        _write_owner(file.owner, reg.fown)
        self._writer.add(FILES, entry)
        return entry.id

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
            flags = FD_CLOEXEC if descriptor.cloexec else 0
            self._writer.add(
                name, pb.fdinfo_entry(id=descriptor.file_id, flags=flags, type=kind, fd=descriptor.fd)
            )


def _write_owner(owner: Owner, entry: pb.fown_entry) -> None:
    entry.pid, entry.pid_type, entry.signum = owner.pid, owner.type, owner.signal
    entry.uid, entry.euid = owner.uid, owner.euid


def _write_epoll(
    targets: Iterable[EpollTarget],
    beside: Mapping[int, int],
    entry: pb.eventpoll_file_entry,
    extra: own.FileExtra,
) -> None:
    """CRIU adds a target by a number that must have its file then; the one that it was added by may be closed."""
    for target in targets:
        same = (fd for fd, file_id in beside.items() if file_id == target.file_id)
        fd = target.fd if beside.get(target.fd) == target.file_id else next(same, target.fd)
        entry.tfd.add(id=0, tfd=fd, events=target.events, data=target.data)
        extra.epoll_files.append(target.file_id)
    if [target.fd for target in targets] != [message.tfd for message in entry.tfd]:
        extra.epoll_fds.extend(target.fd for target in targets)


def _write_timerfd(timer: TimerFd, entry: pb.timerfd_entry) -> None:
    entry.clockid, entry.ticks, entry.settime_flags = timer.clock, timer.ticks, timer.settime_flags
    entry.vsec, entry.vnsec = divmod(timer.value_ns, SECOND_NS)
    entry.isec, entry.insec = divmod(timer.interval_ns, SECOND_NS)
