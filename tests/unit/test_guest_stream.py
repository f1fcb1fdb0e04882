"""What `qemu-serve` says to a QEMU, and hears from it, without one."""

from __future__ import annotations

import io
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import ConnectionLost, ProtocolError
from lazyproc.events import PagesMoved, ignore
from lazyproc.migrate import guest_clone, guest_serve
from lazyproc.migrate.guest_serve import GuestServed, Talk
from lazyproc.model import PAGE, Extent, MemoryObject
from lazyproc.qemu import stream
from lazyproc.qemu.postcopy import ALIVE, NEAR, PagesLeft
from lazyproc.qemu.ram import Block
from lazyproc.qemu.stream import Answer, Command, Event, Pong, Received, Resumed, ReturnPath, Shut, Wanted
from tests.qemu import streams
from tests.qemu.streams import Ends, Machine, Page, Sizes, Told
from tests.unit.garbage import garbage

DEVICES = stream.HEADER + stream.configuration("pc") + b"\x04devices" + bytes([stream.EOF])


def block(number: int, name: str, pages: int) -> Block:
    return Block(name, pages * PAGE, pages * PAGE, PAGE, False, 0, number)


class Memory:
    """Blocks of which these pages have content, each its own."""

    def __init__(self, **blocks: Sequence[bool]) -> None:
        names = sorted(blocks)
        self.blocks = [block(number, name, len(blocks[name])) for number, name in enumerate(names)]
        self._held = {each.object: blocks[each.name] for each in self.blocks}

    def extents(self) -> Mapping[MemoryObject, Sequence[Extent]]:
        return {
            obj: [Extent(number * PAGE, 1, lazy=True) for number, held in enumerate(pages) if held]
            for obj, pages in self._held.items()
        }

    def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
        pages = range(addr // PAGE, addr // PAGE + count)
        assert all(self._held[obj][number] for number in pages), "what has no content is not read"
        return b"".join(struct.pack("<II", obj.id, number + 1) * (PAGE // 8) for number in pages)

    def left(self) -> PagesLeft:
        return PagesLeft(self.blocks, self.extents(), self)

    def content(self) -> dict[tuple[str, int], bytes]:
        names = {each.object: each.name for each in self.blocks}
        return {
            (names[obj], extent.addr): self.read(obj, extent.addr, 1)
            for obj, extents in self.extents().items()
            for extent in extents
        }


def records(data: bytes) -> list[Page]:
    found = list(streams.ram(io.BytesIO(data + stream.END_OF_RAM)))
    return [each for each in found if isinstance(each, Page)]


held = st.lists(st.booleans(), min_size=1, max_size=70)


@given(held, held, st.data())
def test_every_page_with_content_goes_once(one: list[bool], two: list[bool], data: st.DataObject) -> None:
    """Whatever is asked for meanwhile, and what the other end has already not at all."""
    memory = Memory(one=one, two=two)
    left, came = memory.left(), list[Page]()
    there = data.draw(st.sets(st.integers(0, len(one) - 1)))
    left.received(Received("one", sum(1 << number for number in there).to_bytes(16, "little")))
    while chunk := left.next_bulk():
        came += records(chunk)
        number = data.draw(st.integers(0, len(two) - 1))
        left.want(Wanted("two", number * PAGE, PAGE))
        left.want(Wanted("", number * PAGE, PAGE))
        came += records(left.next_urgent())
        if data.draw(st.booleans()):
            came += records(left.next_likely())
    places = [(page.block, page.addr) for page in came]
    assert len(set(places)) == len(places)
    expected = {
        place: page
        for place, page in memory.content().items()
        if place[0] == "two" or place[1] // PAGE not in there
    }
    assert {(page.block, page.addr): page.data for page in came if any(page.data)} == expected


def test_what_lies_around_that_which_is_waited_for_comes_too() -> None:
    """The latest first."""
    left = Memory(ram=[number != 18 for number in range(64)]).left()
    for number in (5, 17):
        left.want(Wanted("ram", number * PAGE, PAGE))
    assert [page.addr // PAGE for page in records(left.next_urgent())] == [5, 17]
    assert [page.addr // PAGE for page in records(left.next_likely())] == [16, *range(19, 16 + NEAR)]
    assert left.waited_for
    assert [page.addr // PAGE for page in records(left.next_likely())] == [*range(5), *range(6, NEAR)]
    assert not left.waited_for


def test_what_one_of_several_waits_for_comes_to_the_others_until_it_has_come_to_life() -> None:
    memory = Memory(ram=[True] * (ALIVE + 1))
    one, other = memory.left(), memory.left()
    for each in (one, other):
        each.alike((one, other))
    for number in range(ALIVE + 1):
        one.want(Wanted("ram", number * PAGE, PAGE))
    assert other.waited_for
    assert other.next_urgent() == b""
    came = [page.addr // PAGE for page in records(b"".join(iter(other.next_likely, b"")))]
    assert came == [*reversed(range(ALIVE))]
    assert not other.waited_for
    assert one.next_urgent()
    assert one.next_likely() == b""


@pytest.mark.parametrize(
    "wanted",
    [Wanted("none", 0, PAGE), Wanted("one", 1, PAGE), Wanted("one", 4 * PAGE, PAGE), Wanted("", 0, PAGE)],
)
def test_what_is_in_no_block_is_refused(wanted: Wanted) -> None:
    with pytest.raises(ProtocolError, match="asks for"):
        Memory(one=[True] * 4).left().want(wanted)


def message(event: Event) -> bytes:
    """As QEMU sends it."""
    match event:
        case Wanted(name, addr, length) if name:
            payload = struct.pack(">QI", addr, length) + bytes([len(name)]) + name.encode()
            return struct.pack(">HH", Answer.PAGES_OF, len(payload)) + payload
        case Wanted(_, addr, length):
            return struct.pack(">HHQI", Answer.PAGES, 12, addr, length)
        case Received(name, bits):
            head = struct.pack(">HHB", Answer.RECEIVED, len(name) + 1, len(name)) + name.encode()
            return head + struct.pack(">Q", len(bits)) + bits + struct.pack(">Q", 0x0123456789ABCDEF)
        case Shut(error):
            return struct.pack(">HHI", Answer.SHUT, 4, error)
        case Resumed():
            return struct.pack(">HHI", Answer.RESUMED, 4, 1)
        case Pong():
            return struct.pack(">HHI", Answer.PONG, 4, 7)


names = st.text("abc.@/", min_size=1, max_size=20)
addresses = st.integers(0, 1 << 40)
events = st.one_of(
    st.builds(Wanted, names | st.just(""), addresses, st.integers(1, 1 << 20)),
    st.builds(Received, names, st.binary(max_size=40)),
    st.builds(Shut, st.integers(0, 1)),
    st.just(Resumed()),
    st.just(Pong()),
)


@given(st.lists(events, max_size=8), st.integers(1, 50))
def test_what_is_heard_is_what_was_said(said: list[Event], size: int) -> None:
    """In whatever pieces it comes."""
    data, path, heard = b"".join(map(message, said)), ReturnPath(), list[Event]()
    for at in range(0, len(data), size):
        heard += path.feed(data[at : at + size])
    assert heard == said


@given(
    garbage(200)
    | st.builds(
        lambda kind, length, rest: struct.pack(">HH", kind, length) + rest,
        st.sampled_from(Answer),
        st.integers(0, 300),
        garbage(200),
    )
)
def test_garbage_is_refused_or_waits_for_more(data: bytes) -> None:
    try:
        list(ReturnPath().feed(data))
    except ProtocolError:
        return


# --- the whole talk -----------------------------------------------------------------------------------------------


class Other:
    """QEMU's end: what it has read on its first connection, and what of its second, page by page."""

    def __init__(self, socks: Sequence[socket.socket]) -> None:
        self._sock, self._fast = socks[0], socks[-1]
        self._file: IO[bytes] = socks[0].makefile("rb")
        self._items = streams.items(self._file)
        self.pages: dict[tuple[str, int], bytes] = {}

    def say(self, event: Event) -> None:
        self._sock.sendall(message(event))

    def resume(self) -> None:
        """The connection before has brought the header."""
        self._items = streams.sections(self._file)

    def next(self) -> streams.Item:
        return next(self._items)

    def until_run(self) -> list[streams.Item]:
        """What came before pages."""
        found: list[streams.Item] = []
        while True:
            item = self.next()
            found.append(item)
            if isinstance(item, Told) and item.number == Command.PACKAGED:
                return found
            if item == Told(Command.PING, bytes(4)):
                self.say(Pong())

    def page(self) -> Page | Ends:
        item = self.next()
        assert isinstance(item, Page | Ends)
        if isinstance(item, Page):
            self.pages[item.block, item.addr] = item.data
        return item

    def fast_pages(self) -> Iterator[Page]:
        with self._fast.makefile("rb") as file:
            for item in streams.ram(file):
                assert isinstance(item, Page)
                self.pages[item.block, item.addr] = item.data
                yield item

    def end(self) -> None:
        while isinstance(self.page(), Page):
            pass
        assert list(self._items) == []
        self.say(Shut(0))


@contextmanager
def talking(
    memory: Memory, work: Callable[[Talk], GuestServed], connections: int = 1
) -> Iterator[tuple[Other, list[GuestServed]]]:
    """The other end of a talk, and, after the block, what it reported."""
    pairs = [socket.socketpair() for _ in range(connections)]
    reports: list[GuestServed] = []
    thread = threading.Thread(target=lambda: reports.append(work(Talk([a for a, _ in pairs], "here"))))
    for _, theirs in pairs:
        theirs.settimeout(10)
    thread.start()
    try:
        yield Other([theirs for _, theirs in pairs]), reports
    finally:
        for _, theirs in pairs:
            theirs.shutdown(socket.SHUT_WR)  # should the block have failed, it hears of it
        thread.join(10)
        for pair in pairs:
            for each in pair:
                each.close()


def serving(memory: Memory) -> Callable[[Talk], GuestServed]:
    def work(talk: Talk) -> GuestServed:
        talk.begin("pc", memory.blocks)
        talk.run(DEVICES)
        return talk.serve(memory.left(), ignore)

    return work


def test_a_guest_is_told_whole() -> None:
    memory = Memory(ram=[True, False, True], rom=[False, True])
    with talking(memory, serving(memory)) as (other, reports):
        head = other.until_run()
        assert head[0] == Machine("pc")
        assert Sizes({"ram": 3 * PAGE, "rom": 2 * PAGE}) in head
        numbers = [item.number for item in head if isinstance(item, Told)]
        missing = [Command.DISCARD] * 2
        assert [n for n in numbers if n != Command.PING] == [
            Command.OPEN_RETURN_PATH, Command.ADVISE, *missing, Command.PACKAGED
        ]  # fmt: skip
        package = head[-1]
        assert isinstance(package, Told)
        assert b"\x04devices" in package.payload
        other.say(Pong())
        other.end()
        assert other.pages == memory.content()
    assert reports[0].pages_bulk == 3


def test_the_listener_hears_of_pages_now_and_then_and_at_the_end() -> None:
    """Each word may cost it a write to a terminal or a file."""
    memory = Memory(ram=[True] * 4000)
    heard: list[object] = []

    def work(talk: Talk) -> GuestServed:
        talk.begin("pc", memory.blocks)
        talk.run(DEVICES)
        return talk.serve(memory.left(), heard.append)

    began = time.monotonic()
    with talking(memory, work) as (other, _):
        other.until_run()
        other.say(Pong())
        other.end()
    moved = [event for event in heard if isinstance(event, PagesMoved)]
    assert len(moved) <= (time.monotonic() - began) / guest_serve.TELL_S + 1
    assert moved[-1].installed == moved[-1].total == 4000


def test_what_is_waited_for_goes_before_the_rest() -> None:
    """It overtakes all that has not gone yet."""
    memory = Memory(ram=[True] * 4000)
    with talking(memory, serving(memory)) as (other, reports):
        other.until_run()
        other.say(Pong())
        other.say(Wanted("ram", 3999 * PAGE, PAGE))
        came = [other.page() for _ in range(500)]
        assert any(isinstance(page, Page) and page.addr == 3999 * PAGE for page in came)
        other.end()
        assert other.pages == memory.content()
    assert (reports[0].pages_urgent, reports[0].pages_bulk) == (1, 3999)


def test_a_guest_that_comes_to_life_has_all_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it waits for and what lies around that comes, and nothing else for a while."""
    monkeypatch.setattr(guest_serve, "QUIET_S", 20.0)
    monkeypatch.setattr(guest_serve, "ALIVE_S", 20.0)
    memory = Memory(ram=[True] * 64)
    with talking(memory, serving(memory)) as (other, _):
        other.until_run()
        other.say(Pong())
        for number in (60, 3):
            other.say(Wanted("ram", number * PAGE, PAGE))
            first = number // NEAR * NEAR
            around = [near for near in range(first, first + NEAR) if near != number]
            came = [other.page() for _ in range(NEAR)]
            assert [page.addr // PAGE for page in came if isinstance(page, Page)] == [number, *around]
        monkeypatch.setattr(guest_serve, "ALIVE_S", 0.0)
        other.say(Wanted("ram", 3 * PAGE, PAGE))  # which wakes it up
        other.end()
        assert other.pages == memory.content()


def test_what_is_waited_for_has_its_own_connection() -> None:
    """Nobody reads the first meanwhile."""
    memory = Memory(ram=[True] * 4000)
    with talking(memory, serving(memory), connections=2) as (other, _):
        other.until_run()
        other.say(Wanted("ram", 3999 * PAGE, PAGE))
        fast = other.fast_pages()
        assert next(fast).addr == 3999 * PAGE
        other.say(Pong())
        other.end()
        assert list(fast) == []
        assert other.pages == memory.content()


def test_the_end_waits_until_the_devices_are_loaded() -> None:
    """Which may need a page without content when all others have gone: nobody would answer after the end."""
    memory = Memory(ram=[True, False])
    with talking(memory, serving(memory)) as (other, reports):
        other.until_run()
        assert other.page() == Page("ram", 0, memory.content()["ram", 0])
        other.say(Wanted("ram", PAGE, PAGE))
        assert other.page() == Page("ram", PAGE, bytes(PAGE))
        other.say(Pong())
        other.end()
    assert reports[0].pages_zero == 1


def test_all_clones_that_are_lost_are_named() -> None:
    memory, names = Memory(ram=[True] * 4), ["unix:/one", "unix:/two", "unix:/three"]
    pairs = [socket.socketpair() for _ in names]
    for _, theirs in pairs:
        theirs.close()
    talks = [Talk([ours], name) for (ours, _), name in zip(pairs, names, strict=True)]
    with pytest.raises(ConnectionLost) as lost:
        guest_clone._served(talks, [memory.left() for _ in talks], DEVICES, ignore)
    assert all(name in str(lost.value) for name in names)
    for ours, _ in pairs:
        ours.close()


def test_what_has_come_does_not_come_again() -> None:
    memory = Memory(ram=[True, True, False, True])

    def work(talk: Talk) -> GuestServed:
        left = memory.left()
        talk.recover(memory.blocks, left)
        return talk.serve(left, ignore)

    with talking(memory, work) as (other, reports):
        other.resume()
        assert other.next() == Told(Command.RECEIVED, b"\x03ram")
        other.say(Received("ram", (0b1001).to_bytes(8, "little")))
        assert other.next() == Told(Command.RESUME, b"")
        other.say(Wanted("ram", 2 * PAGE, PAGE))
        other.say(Resumed())
        other.end()
        assert {place[1]: any(data) for place, data in other.pages.items()} == {PAGE: True, 2 * PAGE: False}
    assert reports[0].pages_bulk == 1
