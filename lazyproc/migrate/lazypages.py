"""`lazy_pages`: `criu restore --lazy-pages` builds a tree, and its missing pages are brought by a keeper, a pager and a
guard, as those of a tree of our own making are (keeper.py).
"""

from __future__ import annotations

import os
import socket
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from lazyproc.errors import ConnectionLost, LazyprocError, Parked, ProtocolError
from lazyproc.events import Event, Listener, Note, StateChanged, ignore
from lazyproc.images.convert import from_images
from lazyproc.images.files import Folder
from lazyproc.images.lazy import LazyMemory, highest_descriptor
from lazyproc.kernel import family
from lazyproc.kernel.deaf import ignore_interrupts
from lazyproc.kernel.fds import AMPLE, make_room
from lazyproc.kernel.nursery import TRANSPORT_FD
from lazyproc.migrate.apart import Client, Messages, result, stream, unplug
from lazyproc.migrate.arrival import Wishes
from lazyproc.migrate.beforehand import Beforehand
from lazyproc.migrate.crew import say
from lazyproc.migrate.criu_supply import CriuSupply, let_source_run
from lazyproc.migrate.identity import identity
from lazyproc.migrate.images_server import demand_same, fill, offered
from lazyproc.migrate.journal import ARRIVING, DESTINATION, Journal, forget_old, records
from lazyproc.migrate.keeper import LIVING, NAME, Keeper
from lazyproc.migrate.local import PageServerOfCriu
from lazyproc.migrate.paging import Preferences
from lazyproc.migrate.place import Place
from lazyproc.migrate.supply import Supply
from lazyproc.pages.peer import Trust
from lazyproc.pages.private import PrivatePages, WithServer, object_of
from lazyproc.pages.session import Session
from lazyproc.pages.tls import Tls
from lazyproc.restore.anchoring import anchor
from lazyproc.restore.ending import end_tree
from lazyproc.restore.handed import (
    Door,
    GaveUp,
    Handed,
    Restorer,
    accepted,
    borrowed,
    forestall,
    has_finished,
)
from lazyproc.restore.handing import dialled as dialled
from lazyproc.restore.lazytree import LazyTask, LazyTree, from_facts, to_facts
from lazyproc.restore.pages import ABOVE_TRANSPORT
from lazyproc.uffd.pager import Pager
from lazyproc.uffd.policy import named

ANCHOR_S = 10.0  # how long a process that is traced is waited for
LOOK_S = 0.005


def lazy_pages(
    directory: Path | str,
    *,
    peer: str | None = None,
    page_server: PageServerOfCriu | None = None,
    insecure: bool = False,
    tls: Tls | None = None,
    work_dir: Path | None = None,
    policy: str = "sequential",
    bulk: bool = True,
    max_rate: int = 0,
    ready: Callable[[], object] = lambda: None,
    listener: Listener = ignore,
) -> Mapping[str, object]:
    """What CRIU's own `lazy-pages` does: bring the memory of one tree that `criu restore --lazy-pages` restores from
    the images in `directory`; the report when all of it has come.

    What these images lack comes from `lazyproc serve -D` at `peer` (HOST:PORT); an empty folder is filled from there
    first. Or all that they call lazy comes from `page_server`; see there. CRIU finds us by lazy-pages.socket in
    `work_dir` (its --work-dir; the folder of the images when absent). `ready` is called when it can. Without `bulk`
    only what is touched comes; `max_rate` are bytes a second of what nobody waits for (0: no limit).

    Who works on it are other processes; from the first instruction of the tree on they go on without us. Raises
    ImageError, CannotListen, UsageError, what `peer` leads to, LazyprocError when the restore fails, and then nothing
    of it runs; Parked when we are interrupted later, or all who worked on it are gone.
    """
    named(policy)
    forget_old()
    images = Path(os.path.abspath(directory))
    wishes = Wishes(lazy=True, policy=policy, bulk=bulk, max_rate=max_rate, traced=False, release=False)
    session, place = Session.new(), Place(peer or "", Trust(insecure, tls=tls), dials=peer is not None)
    facts = {
        "token": session.token,  # nobody's: there is no other side, or one that knows no sessions
        "peer": peer or str(images),
        "criu": True,
        "folder": str(images),
        "wishes": wishes.fields(),
        **place.facts(),
    }
    ours, theirs = stream()
    with ExitStack() as stack:
        stack.enter_context(ours)
        if page_server is not None:
            supply = stack.enter_context(page_server.supply(session.id))
            pages, beforehand = _from_criu(images, page_server, supply, facts, stack)
        else:
            supply = None
            pages, beforehand = _opened(images, place, facts)
            stack.enter_context(pages)
        door = stack.enter_context(closing(Door(work_dir or images)))
        ready()

        def run() -> None:
            ours.close()
            unplug()
            journal = Journal(session.id, DESTINATION, {**facts, "identity": pages.identity()})
            keeper = LazyPagesKeeper(session, journal, place, Client(theirs), Preferences())
            keeper.take_over(door, pages, beforehand)

        with theirs:
            if supply is not None:
                for end in supply.hold():  # the pager attaches itself
                    end.close()
            family.daemon(run, NAME)
            if supply is not None:
                supply.runs = True  # what becomes of the source is the keeper's to say
        door.disown()
        return _awaited(ours, session.id, listener)


def _opened(images: Path, place: Place, facts: dict[str, object]) -> tuple[PrivatePages, Beforehand]:
    """The images, and the pages that have to be there first; where the others are goes into `facts`."""
    with ExitStack() as failed:
        if place.dials:
            pages, beforehand = _from_server(images, place, facts, failed)
        else:
            facts["images"] = str(images)
            facts["supply"] = Supply(str(images), criu=True).facts()
            pages = failed.enter_context(PrivatePages(images))
            pages.segments()
            beforehand = Beforehand(pages, pages)
        failed.pop_all()
        return pages, beforehand


def _from_server(
    images: Path, place: Place, facts: dict[str, object], failed: ExitStack
) -> tuple[PrivatePages, Beforehand]:
    link, checkpoint, there = offered(place.address, place.trust)
    with closing(link):
        facts["offered"] = theirs = identity(checkpoint, there)
        if not Folder(images).images():
            fill(images, checkpoint, there)
        pages = failed.enter_context(PrivatePages(images))
        source = WithServer(pages, there)
        demand_same(identity(from_images(pages.images), source), theirs, place.address)
        return pages, Beforehand(pages, source)


def _from_criu(
    images: Path, server: PageServerOfCriu, supply: CriuSupply, facts: dict[str, object], stack: ExitStack
) -> tuple[PrivatePages, Beforehand]:
    facts["images"], facts["server"] = str(images), server.address
    facts["supply"] = Supply(str(images), criu=True, server=server.address).facts()
    pages = stack.enter_context(PrivatePages(images))
    return pages, Beforehand(pages, supply.pages(pages))


def _awaited(stream: socket.socket, session: str, listener: Listener) -> Mapping[str, object]:
    runs = False

    def hear(event: Event) -> None:
        nonlocal runs
        runs |= isinstance(event, StateChanged) and event.state == "running"
        listener(event)

    lost = f"see lazyproc sessions, and lazyproc resume {session}"
    try:
        report: Mapping[str, object] = result(stream, hear, lost=lost)
        return report
    except KeyboardInterrupt:
        stream.shutdown(socket.SHUT_WR)  # as if we had ended, but for the verdict
        if not (runs or _came_too_late(stream)):
            raise
        raise Parked(
            "its memory goes on coming without this command", where=f"session {session}", remedy=lost
        ) from None
    except Parked:
        if runs or any(record.session == session and record.state == "running" for record in records()):
            raise
        raise LazyprocError(
            "who was to bring the memory was killed before the tree ran, and it never will", where=NAME
        ) from None


def _came_too_late(stream: socket.socket) -> bool:
    """Whether the tree runs although we do not wait any more; else it never will."""
    messages = Messages(stream)
    while (message := messages.read()) is not None:
        kind, value = message
        if kind != "event":
            return bool(kind == "done")
        if isinstance(value, StateChanged) and value.state == "running":
            return True
    return False


class LazyPagesKeeper(Keeper):
    """Of a tree that CRIU restores: until that is finished its record says ARRIVING."""

    _living = (*LIVING, ARRIVING)

    def take_over(self, door: Door, pages: PrivatePages, beforehand: Beforehand) -> None:
        """From the first connection to the last page."""
        make_room(AMPLE)
        self._beforehand = beforehand
        self._entrance = door
        tables = Pager()  # its threads run in the pager; here its tables are filled
        self._pager = self._new_pager()
        self._guard = self._new_guard()
        try:
            expected = {each.vpid: each.ranges is not None for each in pages.memory}
            with closing(door):
                self._clients.first.stop_without_it()
                restorer = accepted(door, expected, self._clients.tell)
            tree, due = _filled(tables, restorer, pages)
            facts = {"tree": to_facts(tree), "ledger": tables.ledger, "cradle": tables.cradle, "due": due}
            self._journal.write(ARRIVING, durable=False, restorer=restorer.detach(), **facts)
        except (LazyprocError, OSError, KeyboardInterrupt) as error:
            if isinstance(error, GaveUp):
                end_tree(_tree_of(error.handed, 0, 0))
            self._fail(error)
            return
        self._committed = True
        self._note_outlived()
        self._note_crew()
        say(self._near, "serve", None)
        self._watch()

    def _take_back(self) -> None:
        """The keeper was killed before everything was handed over. The restore fails when we have ended as well."""
        self._entrance.close()
        self._let_source_run()
        self._clients.failed(LazyprocError("the keeper was killed before the restore", where=NAME))

    def _fail(self, error: BaseException) -> None:
        ignore_interrupts()  # the client's end may be told twice
        self._clients.failed(error if isinstance(error, LazyprocError) else LazyprocError(_words(error)))
        self._let_source_run()
        self._journal.remove()
        self._dismiss()

    def _let_source_run(self) -> None:
        """What CRIU's page server has is of a process that stands still for us."""
        if self._journal.facts.get("server"):
            let_source_run(self._session.id)

    @property
    def _is_arriving(self) -> bool:
        return self._journal.facts.get("state") == ARRIVING

    def _watch(self) -> None:
        try:
            if self._is_arriving:
                self._clients.first.stop_without_it()
            super()._watch()
        except KeyboardInterrupt as error:
            ignore_interrupts()
            if forestall(self._journal.facts["restorer"][0]):
                end_tree(from_facts(self._journal.facts["tree"]))
                self._fail(error)
            else:
                super()._watch()

    # --- the restore ---

    def _others(self) -> list[int]:
        if not self._is_arriving:
            return super()._others()
        return [fd for fd in self._journal.facts["restorer"] if fd >= 0]

    def _patience(self) -> float:
        busy = self._beforehand.pending if self._is_arriving else bool(self._due)
        return LOOK_S if busy else super()._patience()

    def _attend(self, ready: set[int]) -> bool:
        if not self._is_arriving:
            if self._due:
                self._anchor()
            return super()._attend(ready)
        connection, pidfd = self._journal.facts["restorer"]
        try:
            with borrowed(connection) as its:
                finished = has_finished(its)
            self._place_beforehand()
            if not finished and pidfd in ready:
                raise ConnectionLost("it has ended")
        except (ConnectionLost, ProtocolError) as error:
            tree = from_facts(self._journal.facts["tree"])
            end_tree(tree)
            self._let_source_run()
            self._clients.failed(GaveUp(str(error), ()))
            self._journal.remove()
            return False
        if finished:
            self._let_run()
        return True

    def _place_beforehand(self) -> None:
        if self._beforehand.pending:
            tasks, due = from_facts(self._journal.facts["tree"]).tasks, self._due
            self._beforehand.place({tasks[index].vpid: fd for index, fd in due.items()})

    def _let_run(self) -> None:
        """The word is taken when it is on record: who comes after us finds one or the other."""
        ignore_interrupts()
        restorer = self._journal.facts["restorer"]
        self._journal.note("running", self._clients.tell, {"restorer": []})
        for fd in restorer:
            if fd >= 0:
                os.close(fd)
        say(self._near, "run", None)
        self._clients.tell(StateChanged("running", time.monotonic()))

    # --- anchors ---

    @property
    def _due(self) -> dict[int, int]:
        """The processes, by their place in the tree, that have no anchors yet, and a userfaultfd of each."""
        return {int(index): int(fd) for index, fd in self._journal.facts.get("due", ())}

    def _anchor(self) -> None:
        """Not after the pager has begun to take them away: it waits until that is on record."""
        facts, due = self._journal.facts, self._due
        tree = from_facts(facts["tree"])
        left, failed = due, []
        if "whole" in facts:
            left = {}
        elif time.time() > facts["since"] + ANCHOR_S:
            left, failed = {}, [f"pid {tree.tasks[index].pid}: is traced" for index in due]
        else:
            left, errors = anchor(tree, due, facts["ledger"], facts["cradle"])
            failed = list(map(str, errors))
        for why in failed:
            self._clients.tell(Note(f"{why}; its memory is lost if all who bring it are killed at once"))
        if left != due:
            self._journal.note(str(facts["state"]), self._clients.tell, {"due": [*left.items()]})
            for index in due.keys() - left.keys():
                os.close(due[index])


def _filled(tables: Pager, restorer: Restorer, pages: PrivatePages) -> tuple[LazyTree, list[tuple[int, int]]]:
    """The tree, when the pager knows of its memory and has the userfaultfds; and duplicates, by its tasks."""
    alive: list[Handed] = []
    due = []
    for each in pages.memory:
        if each.ranges is not None:
            handed = restorer.handed.pop(each.vpid)
            due.append((len(alive), os.dup(handed.userfaultfd)))
            alive.append(handed)
            space = tables.add_space(handed.userfaultfd, handed.vpid, handed.pid)
            tables.add_regions(space, _rows(each))
    lowest = highest_descriptor(pages.images) + 1
    return _tree_of(alive, lowest, os.fstat(tables.cradle).st_ino), due


def _rows(memory: LazyMemory) -> array[int]:
    """As the pager takes regions."""
    key, rows = object_of(memory).key, array("Q")
    for start, end in memory.ranges or ():
        rows.extend((start, end - start, key, start))
    return rows


def _tree_of(handed: Sequence[Handed], lowest: int, cradle: int) -> LazyTree:
    """The anchors are to have numbers out of the program's way."""
    lowest = max(lowest, TRANSPORT_FD) + ABOVE_TRANSPORT
    numbers = (lowest, lowest + 1, lowest + 2)
    tasks = tuple(LazyTask(each.vpid, each.pid, each.started, *numbers) for each in handed)
    root = tasks[0] if tasks else LazyTask(0, 0, 0, -1, -1, -1)
    return LazyTree(root.pid, root.vpid, 0, tasks, (), (), cradle)


def _words(error: BaseException) -> str:
    return str(error) or "interrupted"
