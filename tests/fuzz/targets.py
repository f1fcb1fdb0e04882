"""The parsers of what comes from strangers, as functions of bytes. Only ProtocolError and ImageError may come out."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lazyproc.images.convert import from_images, memory_objects, to_images
from lazyproc.images.files import Folder, ImageReader, pack, unpack
from lazyproc.images.forecast import Forecast, Room, bare_task, forecast_images, part, read_forecast
from lazyproc.images.pagemap import locate, read_pagemap, to_extents
from lazyproc.migrate.arrival import Wishes
from lazyproc.migrate.needs import needs_in, obstacles_in
from lazyproc.migrate.prepare import Offer
from lazyproc.model import PAGE, Checkpoint, Extent, MemoryObject, Vma, VmaKind
from lazyproc.pages.bundle import NAME as BUNDLE
from lazyproc.pages.bundle import BundledPages, pack_bundle
from lazyproc.pages.images import ImagePages
from lazyproc.pages.remote import extents_of
from lazyproc.pages.session import Session
from lazyproc.wire import criu, jsonobject, native
from lazyproc.wire.frame import HEADER, Frame
from lazyproc.wire.native import Party, Role, Welcome

SESSION = Session("0" * 16, "0" * 32)
STEPS = (1, 7, 32, 4096, 1 << 20)  # bytes at a time
NATIVE = [
    (side, role, dialled) for side in (Party.SOURCE, Party.DESTINATION) for role in Role for dialled in (0, 1)
]
GREETED = -(-128 // len(NATIVE)) * len(NATIVE)
CRIU = [
    (role, dialect)
    for role in criu.Role
    for dialect in (None, *criu.Dialect)
    if dialect or role is criu.Role.SERVER
]


def native_stream(data: bytes) -> None:
    """The first byte chooses the end and whether it is greeted, the second how much comes at a time."""
    if len(data) < 2:
        return
    side, role, dialled = NATIVE[data[0] % len(NATIVE)]
    end = native.Connection(side, dialled=bool(dialled))
    if data[0] >= 128:
        _greet(end, side, role, dialled=bool(dialled))
    _feed(end.receive_data, data[2:], STEPS[data[1] % len(STEPS)], _understand)


def _greet(end: native.Connection, side: Party, role: Role, *, dialled: bool) -> None:
    other = Party.DESTINATION if side is Party.SOURCE else Party.SOURCE
    peer = native.Connection(other, dialled=not dialled)
    one, two = (end, peer) if dialled else (peer, end)
    two.receive_data(one.send(SESSION.hello(role)))
    one.receive_data(two.send(Welcome(SESSION.id)))


def _feed(
    receive: Callable[[bytes], Sequence[object]], data: bytes, step: int, then: Callable[[object], None]
) -> None:
    for at in range(0, len(data), step):
        for event in receive(data[at : at + step]):
            then(event)


def _understand(event: object) -> None:
    """What those who get the event do with it first."""
    match event:
        case native.Needs():
            needs_in(event)
        case native.Obstacles():
            obstacles_in(event, "peer")
        case native.Prepare():
            Offer.of(event.fields)
            Wishes.of(event.fields)
        case native.Map():
            extents_of(event.entries)
        case native.Images():
            unpack(event.data)
        case native.Forecast():
            read_forecast(unpack(event.data))


def criu_stream(data: bytes) -> None:
    if len(data) < 2:
        return
    role, dialect = CRIU[data[0] % len(CRIU)]
    end = criu.Connection(role, dialect)
    if role is criu.Role.CLIENT:
        end.send(criu.Message(criu.Command.GET, 3, 0x7F0000001000, 42))
    _feed(end.receive_data, data[2:], STEPS[data[1] % len(STEPS)], lambda _: None)


def header(data: bytes) -> None:
    """What is let through comes back as it was."""
    if len(data) >= HEADER.size:
        assert Frame.unpack(data[: HEADER.size]).pack() == data[: HEADER.size]


def json_object(data: bytes) -> None:
    """What is let through can be said again."""
    fields = jsonobject.decode(data)
    assert jsonobject.decode(jsonobject.encode(fields)) == fields


def image_set(data: bytes) -> None:
    from_images(unpack(data))


def bundle(data: bytes) -> None:
    """What it has can be read."""
    pages = BundledPages(data, _Nothing())
    for obj, extents in pages.extents().items():
        for extent in extents:
            pages.read(obj, extent.addr, extent.count)


def pagemap(data: bytes) -> None:
    found = read_pagemap(ImageReader("pagemap-1.img", data))
    to_extents(found)
    locate([found])


class _Nothing:
    """Pages that nobody has."""

    def extents(self) -> Mapping[MemoryObject, tuple[Extent, ...]]:
        return {}

    def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
        raise AssertionError(f"{count} pages of {obj} at {addr:#x} are in the bundle")


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    each.__name__: each
    for each in (native_stream, criu_stream, header, json_object, image_set, bundle, pagemap)
}


# --- what is valid ----------------------------------------------------------------------------------------------


def packed(directory: Path) -> bytes:
    """The images of a checkpoint as they travel, the pages that must be there at once among them."""
    folder = Folder(directory)
    whole: Checkpoint = from_images(folder.read())
    images = to_images(whole)
    with ImagePages(folder, memory_objects(whole)) as pages:
        images[BUNDLE] = pack_bundle(whole.memory, pages)
    return pack(images)


def examples(target: str, images: bytes) -> Iterator[bytes]:
    """Inputs to begin with; `images` are those of a real process, as `packed` gives them."""
    match target:
        case "native_stream":
            yield from _native_examples(images)
        case "criu_stream":
            get = criu.Message(criu.Command.GET, 3, 0x7F0000001000, 42)
            close = criu.Message(criu.Command.CLOSE)
            add = criu.Message(criu.Command.ADD_F, 3, 0x7F0000001000, 42, criu.Flag.PRESENT)
            for number, (role, dialect) in enumerate(CRIU):
                stated = dialect or criu.Dialect.V4_2
                said = (get, close) if role is criu.Role.SERVER else (add,)
                content = bytes(add.payload) if role is criu.Role.CLIENT else b""
                yield bytes((number, 2)) + b"".join(criu.encode(each, stated) for each in said) + content
        case "header":
            yield Frame(1, count=1, object=1, addr=4096, tag=1).pack()
            yield Frame(16, count=100).pack()
        case "json_object":
            yield jsonobject.encode({"version": 1, "a": [1.5, None, True, {"b": "ü"}]})
        case "image_set":
            yield pack({name: data for name, data in unpack(images).items() if name != BUNDLE})
        case "bundle":
            run = struct.pack("<QQQQ", 1, 1 << 8 | 1, 4096, 2)
            yield run + bytes(2 * PAGE)
            yield unpack(images)[BUNDLE]
        case "pagemap":
            yield unpack(images)[next(name for name in unpack(images) if name.startswith("pagemap-"))]


_VMA = Vma(4096, 8192, 1, 2, VmaKind.ANON)
_FORECAST = Forecast(part([bare_task((1, 0, 1, 1), 17, (_VMA,))], {}), {1: Room(2, 3, 1)})


def _native_examples(images: bytes) -> Iterator[bytes]:
    said: Mapping[Party, tuple[native.Event, ...]] = {
        Party.SOURCE: (
            native.Needs({"needs": [{"kind": "path", "pid": 1, "where": "fd 3", "path": "/x"}]}),
            native.Forecast(pack(forecast_images(_FORECAST))),
            native.Prepare({"pages": 1, "threads": 1, "cpu": {"a": 1}, "vdso": "00", "mode": "postcopy"}),
            native.Images(images),
            native.Map([native.MapEntry(1 << 8 | 1, 4096, 3)]),
        ),
        Party.DESTINATION: (
            native.Obstacles({"obstacles": [{"pid": 1, "where": "x", "why": "y", "remedy": "z"}], "more": 0}),
            native.Running({"root_pid": 1}),
        ),
    }
    for number, (side, role, dialled) in enumerate(NATIVE):
        other = Party.DESTINATION if side is Party.SOURCE else Party.SOURCE
        if not dialled:
            yield bytes((number, 2)) + native.Connection(other, dialled=True).send(SESSION.hello(role))
        if role is Role.CONTROL:
            peer = native.Connection(other, dialled=not dialled)
            _greet(peer, other, role, dialled=not dialled)
            yield bytes((GREETED + number, 3)) + b"".join(map(peer.send, said[other]))
