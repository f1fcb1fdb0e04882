"""What `criu dump --page-server` and `criu pre-dump --page-server` send becomes pagemaps and pages in a folder.

The other images lie where CRIU was called; both together are a checkpoint (criu/page-xfer.c of CRIU 4.2).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lazyproc.errors import ConnectionLost, ProtocolError
from lazyproc.images.convert import pagemap_name
from lazyproc.images.draft import filled
from lazyproc.images.files import Folder, ImageWriter
from lazyproc.images.pagemap import PE_PARENT, PE_PRESENT
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.model import MemoryObject, ObjectKind
from lazyproc.wire.criu import Command, Connection, Event, HasParent, Message, PageBytes, Role, Status

FIRST_PAGES_ID = 65537  # up_page_ids_base: above those of the images that CRIU writes itself
PARENT = "parent"
_READ = 1 << 20
_OPEN = (Command.OPEN, Command.OPEN2)
_ADD = {Command.ADD: PE_PRESENT, Command.HOLE: PE_PARENT}
# The kinds in dst_id: of 4.2, and the numbers that older ones had for them (decode_pm).
_TASK, _SHARED = frozenset({1, 10, 11, 16, 17}), frozenset({2, 27, 28, 29, 32, 33, 34})


def store(sock: socket.socket, where: str, folder: Folder) -> int:
    """Take one transfer; how many pages have come. All of it is on the disk before CRIU is told so.

    `sock` is a blocking stream, and stays the caller's. A transfer that breaks off leaves nothing. Raises
    ConnectionLost, ProtocolError, ImageError.
    """
    return _Transfer(sock, where, folder).run()


class _Transfer:
    def __init__(self, sock: socket.socket, where: str, folder: Folder) -> None:
        self._sock = sock
        self._where = where
        self._folder = folder
        self._connection = Connection(Role.SERVER)
        self._events = self._received()
        self._next: Event | None = None
        self._pages = 0
        self._pagemaps = ImageWriter()

    def run(self) -> int:
        half = Folder(self._folder.path / f".receiving-{os.urandom(4).hex()}")
        with self._blamed():
            with filled(half, early=True) as draft:
                pages_id = self._free_pages_id()
                while not isinstance(event := self._take(), Message) or event.command not in (
                    Command.CLOSE,
                    Command.FORCE_CLOSE,
                ):
                    if obj := self._opened(event):
                        name = pagemap_name(obj)
                        self._pagemaps.add(name, pb.pagemap_head(pages_id=pages_id))
                        draft.write_file(f"pages-{pages_id}.img", self._pieces(name, event))
                        pages_id += 1
                for name, image in self._pagemaps.finish().items():
                    draft.write_file(name, [image])
            self._publish(half)
            self._sock.sendall(self._connection.send(Status(0)))
            with suppress(OSError):
                self._sock.recv(1)  # who closes first keeps the port
        return self._pages

    def _opened(self, event: Event) -> MemoryObject | None:
        """The object whose pages come next; questions are answered. Raises ProtocolError."""
        if not isinstance(event, Message) or event.command is Command.GET:
            raise ProtocolError(f"{event} where pages are stored")
        obj = _object(event.dst_id)
        parent = (self._folder.path / PARENT / pagemap_name(obj)).exists()
        if event.command in (Command.OPEN2, Command.PARENT):
            self._sock.sendall(self._connection.send(HasParent(parent)))
        if event.command in _OPEN:
            return obj
        if event.command is Command.PARENT:
            return None
        self._next = event  # pages of an object that was not opened, as old ones send them
        return obj

    def _pieces(self, name: str, opened: Message | Event) -> Iterator[bytes]:
        """The pages of one object; its pagemap grows meanwhile."""
        assert isinstance(opened, Message), "it has opened an object"
        while True:
            event = self._take()
            if isinstance(event, PageBytes):
                yield bytes(event.data)
            elif isinstance(event, Message) and self._is_part(event, opened):
                flags = _ADD.get(event.command, int(event.flags))
                entry = pb.pagemap_entry(
                    vaddr=event.vaddr, compat_nr_pages=event.nr_pages, nr_pages=event.nr_pages, flags=flags
                )
                if flags & PE_PARENT:
                    entry.in_parent = True
                self._pagemaps.add(name, entry)
                self._pages += event.nr_pages if event.payload else 0
            else:
                self._next = event
                return

    def _is_part(self, event: Message, opened: Message) -> bool:
        return event.command in (Command.ADD_F, *_ADD) and event.dst_id == opened.dst_id

    def _take(self) -> Event:
        """The next event. Raises ConnectionLost when there is none: the transfer is not complete."""
        event, self._next = self._next, None
        event = event or next(self._events, None)
        if event is None:
            raise ConnectionLost("CRIU has hung up before the end; nothing of it is kept", where=self._where)
        return event

    def _received(self) -> Iterator[Event]:
        while data := self._sock.recv(_READ):
            yield from self._connection.receive_data(data)

    def _free_pages_id(self) -> int:
        number = FIRST_PAGES_ID
        while (self._folder.path / f"pages-{number}.img").exists():
            number += 1
        return number

    def _publish(self, half: Folder) -> None:
        """Pages first: a pagemap has its pages whenever the host loses power."""
        names = sorted(half.images(), key=lambda name: not name.startswith("pages-"))
        for name in names:
            try:
                os.rename(half.path / name, self._folder.path / name)
            except OSError as error:
                raise Folder.failed(error, self._folder.path / name) from None
        half.path.rmdir()
        fd = os.open(self._folder.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except ConnectionLost:
            raise
        except ProtocolError as error:
            raise ProtocolError(error.what, where=self._where, remedy=error.remedy or "is it CRIU?") from None
        except OSError as error:
            raise ConnectionLost(f"the connection broke ({error.strerror})", where=self._where) from None


def _object(dst_id: int) -> MemoryObject:
    kind, number = dst_id & 0xFF, dst_id >> 8
    if kind in _TASK or kind in _SHARED:
        return MemoryObject(ObjectKind.TASK if kind in _TASK else ObjectKind.SHARED, number)
    raise ProtocolError(f"{dst_id:#x} is not the number of a memory object")
