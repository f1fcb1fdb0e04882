"""The xsave area of a thread and the fields that CRIU has for it. Pure.

`area` below is what PTRACE_GETREGSET(NT_X86_XSTATE) gives: the 512-byte FXSAVE region with the XCR0 mask at
byte 464, a 64-byte header, then components in the standard format (Intel SDM vol. 1 ch. 13;
arch/x86/include/asm/fpu/types.h). CRIU keeps the components it knows by name and drops the rest
(images/core-x86.proto, criu/arch/x86/crtools.c:100), so the difference travels as patches in lazyproc.img.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from struct import Struct

from lazyproc.errors import ImageError
from lazyproc.facts import dataclass, replace
from lazyproc.images.pb import lazyproc_pb2 as own
from lazyproc.images.pb import process_pb2 as pb

MAX_SIZE = 1 << 16
_FXSAVE = Struct("<4H2Q2I32I64I")  # cwd .. xmm_space: 416 bytes; padding and the XCR0 word follow
_HEADER = 512
_XCR0 = 464
_EXTENDED = 576  # where the components begin
_CHUNK = 16  # granularity of patches
_SOMETHING = re.compile(rb"[^\0]")


@dataclass(frozen=True, slots=True)
class _Component:
    bit: int
    field: str
    layout: Struct
    offset: int  # Intel's place, with room for MPX and AVX-512

    @property
    def size(self) -> int:
        return self.layout.size


_INTEL = (
    _Component(2, "ymmh_space", Struct("<64I"), 576),
    _Component(3, "bndreg_state", Struct("<8Q"), 960),
    _Component(4, "bndcsr_state", Struct("<8Q"), 1024),
    _Component(5, "opmask_reg", Struct("<8Q"), 1088),
    _Component(6, "zmm_upper", Struct("<64Q"), 1152),
    _Component(7, "hi16_zmm", Struct("<128Q"), 1664),
    _Component(9, "pkru", Struct("<2I"), 2688),
)


_LEGACY = 0b11  # the FXSAVE region: x87, SSE
_CRIUS = _LEGACY | sum(1 << part.bit for part in _INTEL)


def _layout(area: bytes | bytearray) -> tuple[_Component, ...]:
    """Where the components of this area lie.

    CPUID leaf 0xD tells; Intel's answers are fixed and leave gaps, AMD's leave none. An area too short for
    Intel's places of what XCR0 enables is AMD's.
    """
    return _places(int.from_bytes(area[_XCR0 : _XCR0 + 8], "little"), len(area))


@functools.lru_cache(maxsize=16)  # all threads of a host have the same
def _places(enabled: int, size: int) -> tuple[_Component, ...]:
    held = [part for part in _INTEL if enabled >> part.bit & 1] if enabled else list(_INTEL)
    if not held or not enabled or held[-1].offset + held[-1].size <= size:
        return tuple(part for part in held if part.offset + part.size <= size)
    packed, at = [], _INTEL[0].offset
    for part in held:
        if at + part.size <= size:
            packed.append(replace(part, offset=at))
        at += part.size
    return tuple(packed)


def relaid(area: bytes, offsets: Mapping[int, int]) -> bytes:
    """The area with its components where a processor has them, by these `offsets` of their bits (CPUID leaf 0xD).

    CRIU's image has components by name and does not say where they were: those have Intel's places here (`from_entry`).
    """
    parts = [part for part in _layout(area) if part.bit in offsets]
    if all(offsets[part.bit] == part.offset for part in parts):
        return area
    ends = [offsets[part.bit] + part.size for part in parts]
    fitted = bytearray(area[:_EXTENDED].ljust(max(ends), b"\0"))
    for part in parts:
        at = offsets[part.bit]
        fitted[at : at + part.size] = area[part.offset : part.offset + part.size]
    return bytes(fitted)


def to_extra(area: bytes, entry: pb.user_x86_fpregs_entry, extra: own.ThreadExtra) -> None:
    """For lazyproc alone: as it is, where CRIU's entry would have it by its fields."""
    entry.CopyFrom(_no_fields())
    extra.xsave_size = len(area)
    end = len(area)
    while end and area[end // 2 : end] == bytes(
        end - end // 2
    ):  # memcmp(3): rstrip() would look at each byte
        end //= 2
    extra.xsave = area[:end]


@functools.cache
def _no_fields() -> pb.user_x86_fpregs_entry:
    return pb.user_x86_fpregs_entry(cwd=0, swd=0, twd=0, fop=0, rip=0, rdp=0, mxcsr=0, mxcsr_mask=0)


def to_entry(area: bytes, entry: pb.user_x86_fpregs_entry, extra: own.ThreadExtra) -> None:
    """Fills CRIU's entry from the area, and the patches that give back exactly the area."""
    padded = area.ljust(_HEADER + 64, b"\0")
    fields = _FXSAVE.unpack_from(padded)
    entry.cwd, entry.swd, entry.twd, entry.fop, entry.rip, entry.rdp, entry.mxcsr, entry.mxcsr_mask = fields[
        :8
    ]
    entry.st_space.extend(fields[8:40])
    entry.xmm_space.extend(fields[40:])
    beyond = bytearray(padded)  # what CRIU has no field for
    beyond[: _FXSAVE.size] = bytes(_FXSAVE.size)
    beyond[_HEADER : _HEADER + 8] = bytes(8)
    entry.xsave.CopyFrom(_unused(int.from_bytes(area[_XCR0 : _XCR0 + 8], "little"), len(area)))
    entry.xsave.xstate_bv = int.from_bytes(padded[_HEADER : _HEADER + 8], "little")
    for part in _layout(area):
        content = area[part.offset : part.offset + part.size]
        if content != bytes(part.size):  # memcmp(3): any() would look at each byte
            values = getattr(entry.xsave, part.field)
            del values[:]
            values.extend(part.layout.unpack(content))
            beyond[part.offset : part.offset + part.size] = bytes(part.size)
    extra.xsave_size = len(area)
    for start, end in _runs(beyond):
        extra.xsave_patches.add(offset=start, data=area[start:end])


@functools.lru_cache(maxsize=16)
def _unused(enabled: int, length: int) -> pb.user_x86_xsave_entry:
    """Components that a thread has not used are zeros: those are copied, not written one by one."""
    entry = pb.user_x86_xsave_entry(xstate_bv=0)
    for part in _places(enabled, length):
        getattr(entry, part.field).extend(part.layout.unpack(bytes(part.size)))
    return entry


def from_entry(entry: pb.user_x86_fpregs_entry, extra: own.ThreadExtra | None, name: str) -> bytes:
    """The area. Without `extra` (an image of CRIU's) it ends with the last component; XCR0 is unknown."""
    if extra is None or not extra.HasField("xsave_size"):
        if lost := entry.xsave.xstate_bv & ~_CRIUS:
            raise ImageError(
                f"the thread used components of the processor that CRIU does not save (xsave bits {lost:#x})",
                where=name,
                remedy="dump it with lazyproc",
            )
        held = [part for part in _INTEL if getattr(entry.xsave, part.field)]
        size = held[-1].offset + held[-1].size if held else _HEADER + 64
        return bytes(_rebuild(entry, _INTEL, size, name))
    if extra.HasField("xsave"):
        if not len(extra.xsave) <= extra.xsave_size <= MAX_SIZE:
            raise _bad(name)
        return extra.xsave.ljust(extra.xsave_size, b"\0")
    if extra.xsave_size > MAX_SIZE or any(
        patch.offset + len(patch.data) > extra.xsave_size for patch in extra.xsave_patches
    ):
        raise _bad(name)
    known = bytearray(extra.xsave_size)
    _lay(known, extra.xsave_patches)
    area = _rebuild(entry, _layout(known), extra.xsave_size, name)
    _lay(area, extra.xsave_patches)
    return bytes(area)


def _rebuild(
    entry: pb.user_x86_fpregs_entry, layout: Iterable[_Component], size: int, name: str
) -> bytearray:
    """An area of `size` bytes from CRIU's fields alone."""
    area = bytearray(max(size, _HEADER + 64))
    try:
        _FXSAVE.pack_into(
            area, 0, entry.cwd, entry.swd, entry.twd, entry.fop, entry.rip, entry.rdp, entry.mxcsr,
            entry.mxcsr_mask, *entry.st_space, *entry.xmm_space,
        )  # fmt: skip
        # A processor without XSAVE has x87 and SSE all the same.
        used = entry.xsave.xstate_bv if entry.HasField("xsave") else _LEGACY
        struct.pack_into("<Q", area, _HEADER, used)
        for part in layout:
            values = getattr(entry.xsave, part.field)
            if values:
                part.layout.pack_into(area, part.offset, *values)
    except struct.error:
        raise _bad(name) from None
    del area[size:]
    return area


def _runs(data: bytearray) -> Iterator[tuple[int, int]]:
    """The runs of 16-byte chunks that are not all zeros; none goes on from the header into what is behind it, which is
    11 KiB of zeros in most threads.
    """
    for begin, words in ((0, bytes(data[:_EXTENDED])), (_EXTENDED, bytes(data[_EXTENDED:]))):
        end = 0
        if words == bytes(len(words)):
            continue
        while (found := _SOMETHING.search(words, end)) is not None:
            start = end = found.start() & -_CHUNK
            while any(words[end : end + _CHUNK]):
                end += _CHUNK
            yield begin + start, begin + end


def _lay(area: bytearray, patches: Iterable[own.XsavePatch]) -> None:
    for patch in patches:
        area[patch.offset : patch.offset + len(patch.data)] = patch.data


def _bad(name: str) -> ImageError:
    return ImageError("the xsave area is garbled", where=name, remedy="take the checkpoint again")
