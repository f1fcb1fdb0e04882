"""`serve`: a process tree or a folder of images, for whoever comes to restore it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from queue import Queue

from lazyproc.errors import LazyprocError
from lazyproc.events import Listener, Note, StateChanged, ignore
from lazyproc.images.convert import from_images, memory_objects, to_images
from lazyproc.images.files import EXTRAS, Folder, pack
from lazyproc.migrate.asking import obstacles_there
from lazyproc.migrate.link import Gathering, Link
from lazyproc.migrate.moving import BUILD_S, Way, comes_back, moved
from lazyproc.migrate.order import USUAL, Order
from lazyproc.migrate.prepare import Offer, vdso_build_id
from lazyproc.migrate.source import TreeMove, look
from lazyproc.migrate.talk import Unfit, expect
from lazyproc.model import Checkpoint
from lazyproc.pages.bundle import NAME, pack_bundle
from lazyproc.pages.criu_server import Shelf, answer
from lazyproc.pages.criu_store import store
from lazyproc.pages.door import Caller, Door, listen
from lazyproc.pages.images import ImagePages
from lazyproc.pages.peer import Trust
from lazyproc.pages.remote import maps_of
from lazyproc.pages.server import PageServer
from lazyproc.pages.tls import Tls
from lazyproc.private import make_folder
from lazyproc.restore.crius import fitted
from lazyproc.wire.native import Built, Commit, Committed, Images, Party, Released, Running

DOOR_S = 0.2


def serve(
    target: int | Path | str,
    address: str,
    order: Order = USUAL,
    *,
    insecure: bool = False,
    tls: Tls | None = None,
    once: bool = False,
    ready: Callable[[], object] = lambda: None,
    receive: bool = False,
    listener: Listener = ignore,
) -> None:
    """Offer a process tree, by the pid of its root, or a folder of images at `address` (HOST:PORT).

    A tree is frozen when the first client has come, and handed over to it; returns when its memory has followed. A
    folder is served to any number of clients until interrupted, or with `once` until one has all it wants; with
    `receive` pages that CRIU sends are stored there. Of a folder `ready` is called when clients may come. `tls` and
    `insecure` as with lazyproc.migrate.

    Raises UsageError, CannotListen; for a tree CannotBeDone, with the tree running as before, and Parked as
    lazyproc.migrate; for a folder ImageError.
    """
    order.demand_known()
    trust = Trust(insecure, tls=tls)
    if receive and not isinstance(target, int):
        pages = receive_pages(Path(target), address, trust=trust, ready=ready, listener=listener)
        listener(Note(f"{pages} pages stored in {target}"))
    elif isinstance(target, int):
        serve_process(target, address, order, trust=trust, listener=listener)
    else:
        serve_folder(Path(target), address, order, trust=trust, once=once, ready=ready, listener=listener)


def serve_process(pid: int, address: str, order: Order, *, trust: Trust, listener: Listener) -> None:
    """Hand the tree under `pid` to the first client; it is frozen when that has come, not before.

    A client that fails before the commit lets the tree run on, and the next one may try. After it the client's pages
    are served by a process that outlives this one, and a client that has lost its connection may come back. Raises
    CannotBeDone, and what `migrate` does after the commit.
    """
    look(pid, listener, tcp_close=order.tcp_close)
    gathering = Gathering()
    with listen(address, Party.SOURCE, trust=trust, report=listener) as door, closing(gathering):
        listener(Note(f"listening on port {door.port}"))
        while True:
            link = gathering.next(door, DOOR_S)
            if link is None:
                continue
            try:
                moved(TreeMove(pid, order), _way(link, door, trust), listener=listener, let_go=link.close)
                return
            except LazyprocError as error:
                if error.exit_code != 1 and not isinstance(error, Unfit):
                    raise
                listener(Note(f"session {link.session.id}: {error}; the tree runs on"))


def _way(link: Link, door: Door, trust: Trust) -> Way:
    """To a client that has called, and will call again."""
    facts = {
        "peer": link.control.peer,
        "address": door.address,
        "token": link.session.token,
        **trust.facts(),
    }
    return Way(link.session, lambda _: link, comes_back(door, link.session), facts)


def serve_folder(
    directory: Path,
    address: str,
    order: Order,
    *,
    trust: Trust,
    once: bool = False,
    ready: Callable[[], object] = lambda: None,
    listener: Listener,
) -> None:
    """Serve the images in `directory` to any number of clients at once, ours and CRIU's, until interrupted; or only
    `once`, until one has said that it has all it wants. `ready` is called when clients may come.
    """
    served = threading.Event()
    folder = Folder(directory)
    images = folder.read()
    checkpoint = from_images(images)
    gathering = Gathering()
    with (
        ImagePages(folder, memory_objects(checkpoint)) as pages,
        listen(
            address, Party.SOURCE, trust=trust, report=listener, criu=_criu_clients(pages, served, listener)
        ) as door,
        closing(gathering),
    ):
        if EXTRAS not in images:
            checkpoint = fitted(checkpoint, pages)
        _server_of(pages).stop()  # what is wrong with it is said now, and not to the first client
        listener(Note(f"listening on port {door.port}"))
        ready()
        while not (once and served.is_set()):
            link = gathering.next(door, DOOR_S)
            if link is not None:
                client = _Client(link, checkpoint, pages, order, served, listener)
                threading.Thread(target=client.run, daemon=True).start()


def receive_pages(
    directory: Path,
    address: str,
    *,
    trust: Trust,
    ready: Callable[[], object] = lambda: None,
    listener: Listener,
) -> int:
    """Store what `criu dump --page-server` sends in `directory`, which is made; returns how many pages it was, when one
    transfer is complete. What breaks off leaves nothing, and the next one may come.
    """
    make_folder(directory)
    stored: Queue[int] = Queue()

    def store_one(sock: socket.socket, where: str) -> None:
        with sock:
            try:
                stored.put(store(sock, where, Folder(directory)))
            except LazyprocError as error:
                listener(Note(f"ended a connection: {error}"))

    def begin(sock: socket.socket, where: str) -> None:
        threading.Thread(target=store_one, args=(sock, where), daemon=True).start()

    with listen(address, Party.DESTINATION, trust=trust, report=listener, criu=begin) as door:
        listener(Note(f"listening on port {door.port}"))
        ready()
        while stored.empty():
            if (channel := door.accept(DOOR_S)) is not None:
                with suppress(LazyprocError):
                    channel.refuse("pages of CRIU's are stored here, and nothing else")
    return stored.get()


def _server_of(pages: ImagePages) -> PageServer:
    return PageServer((s.key, s.start, s.end, s.fd, s.offset) for s in pages.segments())


def _criu_clients(pages: ImagePages, served: threading.Event, listener: Listener) -> Caller:
    """Begins to answer a lazy-pages daemon of CRIU."""
    shelf = Shelf(pages, pages.extents())

    def serve_one(sock: socket.socket, where: str) -> None:
        with sock:
            try:
                if answer(sock, where, shelf, lambda *_: None):
                    served.set()
            except LazyprocError as error:
                listener(Note(f"ended a connection: {error}"))

    return lambda sock, where: threading.Thread(target=serve_one, args=(sock, where), daemon=True).start()


class _Client:
    """One restore from a folder. The folder stays whatever becomes of it."""

    def __init__(
        self,
        link: Link,
        checkpoint: Checkpoint,
        pages: ImagePages,
        order: Order,
        served: threading.Event,
        listener: Listener,
    ) -> None:
        self._served = served
        self._link = link
        self._checkpoint = checkpoint
        self._pages = pages
        self._order = order
        self._listener = listener

    def run(self) -> None:
        try:
            with _server_of(self._pages) as server:  # a server keeps count of all that it ever served
                self._talk(server)
            self._served.set()
        except LazyprocError as error:
            self._listener(Note(f"session {self._link.session.id}: {error}"))
        finally:
            self._link.close()

    def _talk(self, server: PageServer) -> None:
        control = self._link.control
        memory = self._checkpoint.memory
        count = sum(extent.count for extents in memory.values() for extent in extents)
        threads = sum(len(task.threads) for task in self._checkpoint.tasks)
        vdso = self._checkpoint.root.mm.vdso_build_id if self._checkpoint.root.mm else vdso_build_id()
        offer = Offer(count, threads, 0, {}, vdso.hex())
        against = obstacles_there(control, offer, (), self._order.fields(), self._listener)
        if against:
            raise Unfit(against)
        server.serve(self._link.urgent.detach(), "urgent")
        server.serve(self._link.bulk.detach(), "bulk")
        images = to_images(self._checkpoint)
        images[NAME] = pack_bundle(memory, self._pages)
        control.send(Images(pack(images)))
        expect(control, Built, BUILD_S)
        control.send(Commit())
        expect(control, Committed, BUILD_S)
        expect(control, Running, BUILD_S)
        self._listener(StateChanged("running", time.monotonic()))
        for part in maps_of(memory, control.peer_revision):
            control.send(part)
        while control.receive(DOOR_S) is None:
            continue
        control.send(Released())
