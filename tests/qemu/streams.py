"""QEMU's migration stream, read: what the destination of a guest sees, as far as it is no state of devices.

From a file, which may be a socket's. What QEMU 7.2 itself sends is the reference (migration/savevm.c, ram.c).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

from lazyproc.facts import dataclass
from lazyproc.model import PAGE
from lazyproc.qemu import stream

_ADDRESS = ~(PAGE - 1)


@dataclass(frozen=True, slots=True)
class Machine:
    name: str


@dataclass(frozen=True, slots=True)
class Told:
    """A command; of PACKAGED the content of the package."""

    number: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of each RAM block."""

    blocks: dict[str, int]


@dataclass(frozen=True, slots=True)
class Page:
    block: str
    addr: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Ends:
    """The last of the RAM."""


@dataclass(frozen=True, slots=True)
class Devices:
    """From here on nobody knows how long things are but their device."""


Item = Machine | Told | Sizes | Page | Ends | Devices


def items(file: IO[bytes]) -> Iterator[Item]:
    """All of them up to the first device or the end. AssertionError for what QEMU would not take."""
    assert exactly(file, 8) == stream.HEADER
    yield from sections(file)


def sections(file: IO[bytes]) -> Iterator[Item]:
    """The same without the header, as after a loss of the connection."""
    block = ""
    while (kind := exactly(file, 1)[0]) != stream.EOF:
        if kind == stream.CONFIGURATION:
            yield Machine(exactly(file, _number(file, ">I")).decode())
        elif kind == stream.COMMAND:
            yield command(file)
        elif kind in (stream.SECTION_START, stream.SECTION_PART, stream.SECTION_END):
            section = _number(file, ">I")
            if kind == stream.SECTION_START:
                assert _name(file) == "ram"
                assert (_number(file, ">I"), _number(file, ">I")) == (0, stream.RAM_VERSION)
            for item in ram(file, block):
                block = item.block if isinstance(item, Page) else block
                yield item
            assert exactly(file, 1)[0] == stream.FOOTER
            assert _number(file, ">I") == section
            if kind == stream.SECTION_END:
                yield Ends()
        else:
            yield Devices()
            return


def command(file: IO[bytes]) -> Told:
    number, length = struct.unpack(">HH", exactly(file, 4))
    payload = exactly(file, length)
    if number == stream.Command.PACKAGED:
        payload = exactly(file, struct.unpack(">I", payload)[0])
    return Told(number, payload)


def ram(file: IO[bytes], block: str = "") -> Iterator[Sizes | Page]:
    """Records up to EOS; all there are on a connection for what is waited for. The first may belong to the `block` of
    the section before.
    """
    while True:
        word = _number(file, ">Q")
        addr, flags = word & _ADDRESS, word & ~_ADDRESS
        if flags == stream.EOS:
            return
        if flags == stream.MEM_SIZE:
            yield Sizes(_sizes(file, addr))
            continue
        if not flags & stream.CONTINUE:
            block = _name(file)
        flags &= ~stream.CONTINUE
        assert flags in (stream.ZERO, stream.PAGE_FLAG), hex(flags)
        whole = flags == stream.PAGE_FLAG
        yield Page(block, addr, exactly(file, PAGE) if whole else exactly(file, 1) * PAGE)


def _sizes(file: IO[bytes], total: int) -> dict[str, int]:
    found: dict[str, int] = {}
    while sum(found.values()) < total:
        name = _name(file)
        found[name] = _number(file, ">Q")
    assert sum(found.values()) == total
    return found


def exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    assert len(data) == count, "it ends too early"
    return data


def _number(file: IO[bytes], form: str) -> int:
    number: int = struct.unpack(form, exactly(file, struct.calcsize(form)))[0]
    return number


def _name(file: IO[bytes]) -> str:
    return exactly(file, exactly(file, 1)[0]).decode()
