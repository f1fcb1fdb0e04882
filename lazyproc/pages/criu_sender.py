"""The pages of a checkpoint go to a page server, as those of `criu dump --page-server`: `criu page-server` or `lazyproc
serve --receive` (criu/page-xfer.c of CRIU 4.2). The server writes the pagemaps; the other images stay here.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from lazyproc.errors import ConnectionLost, ProtocolError
from lazyproc.images.convert import memory_objects, pagemap_name, to_images
from lazyproc.images.draft import Draft
from lazyproc.images.pagemap import merge, split
from lazyproc.model import Checkpoint, MemoryObject, ObjectKind
from lazyproc.pages import PageSource
from lazyproc.pages.criu_source import connected, end_in_order
from lazyproc.pages.peer import Trust
from lazyproc.pages.storing import Store, Stored
from lazyproc.wire.criu import Command, Connection, Dialect, Event, Flag, HasParent, Message, Role, Status

_KINDS = {ObjectKind.TASK: 1, ObjectKind.SHARED: 2}  # in dst_id


@contextmanager
def sending(address: str, trust: Trust) -> Iterator[Store]:
    """A Store whose pages go to the server at HOST:PORT, which is dialled at once and keeps them when all have come.

    Raises UsageError for the address, ConnectionLost, PermissionDenied; the Store also ProtocolError, ImageError.
    """
    with connected(address, trust) as sock:
        yield partial(_store, sock, address)


def _store(
    sock: socket.socket, where: str, draft: Draft, checkpoint: Checkpoint, source: PageSource
) -> Stored:
    theirs = {pagemap_name(obj) for obj in memory_objects(checkpoint)}
    images = {name: data for name, data in to_images(checkpoint).items() if name not in theirs}
    draft.write(images)
    began = time.monotonic()
    with _blamed(where):
        pages = _Transfer(sock).run(checkpoint, source)
    return Stored(pages, (time.monotonic() - began) * 1e3, sum(map(len, images.values())))


class _Transfer:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._connection = Connection(Role.CLIENT, Dialect.V4_2)

    def run(self, checkpoint: Checkpoint, source: PageSource) -> int:
        """How many pages it were. The server has them on its disk, as far as it says so."""
        pages = sum(self._send_object(obj, checkpoint, source) for obj in memory_objects(checkpoint))
        self._say(Message(Command.CLOSE))
        if (answer := self._heard()) != Status(0):
            raise ProtocolError(f"the end is answered with {answer}")
        end_in_order(self._sock)
        return pages

    def _send_object(self, obj: MemoryObject, checkpoint: Checkpoint, source: PageSource) -> int:
        number, pages = obj.id << 8 | _KINDS[obj.kind], 0
        self._say(Message(Command.OPEN2, dst_id=number))
        if not isinstance(answer := self._heard(), HasParent):
            raise ProtocolError(f"OPEN2 is answered with {answer}")
        for extent in split(merge(checkpoint.memory.get(obj, ()))):
            flags = Flag.PRESENT | (Flag.LAZY if extent.lazy else Flag.NONE)
            self._say(Message(Command.ADD_F, extent.count, extent.addr, number, flags), socket.MSG_MORE)
            self._sock.sendall(source.read(obj, extent.addr, extent.count))
            pages += extent.count
        return pages

    def _say(self, message: Message, flags: int = 0) -> None:
        plain = type(self._sock) is socket.socket  # a TLS socket takes no flags
        self._sock.sendall(self._connection.send(message), flags if plain else 0)

    def _heard(self) -> Event:
        while data := self._sock.recv(self._connection.wanted):
            for event in self._connection.receive_data(data):
                return event
        raise ConnectionLost("the page server has hung up")


@contextmanager
def _blamed(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConnectionLost(f"the connection broke ({error.strerror or error})", where=where) from None
    except (ConnectionLost, ProtocolError) as error:
        remedy = error.remedy or "see what it says, and whether it has room"
        raise type(error)(error.what, where=error.where or where, remedy=remedy) from None
