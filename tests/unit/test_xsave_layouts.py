"""Vector state in the places of both makers of processors, whichever runs the test: CRIU's fields go by name."""

from __future__ import annotations

import struct

import pytest

from lazyproc.facts import dataclass
from lazyproc.images import xsave
from lazyproc.images.pb import lazyproc_pb2 as own
from lazyproc.images.pb import process_pb2 as pb

SIZES = {2: 256, 5: 64, 6: 512, 7: 1024, 9: 8, 17: 64, 18: 8192}
FIELDS = {2: "ymmh_space", 5: "opmask_reg", 6: "zmm_upper", 7: "hi16_zmm", 9: "pkru"}
WORDS = {2: "I", 5: "Q", 6: "Q", 7: "Q", 9: "I"}


@dataclass(frozen=True, slots=True)
class Processor:
    """What leaf 0xD of CPUID says: components of XCR0, bytes of the area, offsets by bit."""

    name: str
    enabled: int
    size: int
    offsets: dict[int, int]

    def area(self) -> bytes:
        """Every component of bytes of its own."""
        area = bytearray(self.size)
        area[:416] = b"\x11" * 416
        struct.pack_into("<Q", area, 464, self.enabled)
        struct.pack_into("<Q", area, 512, self.enabled & CRIUS)
        for bit in self.known():
            area[self.offsets[bit] : self.offsets[bit] + SIZES[bit]] = _content(bit)
        return bytes(area)

    def known(self) -> list[int]:
        return [bit for bit in self.offsets if bit in FIELDS]

    def content(self, area: bytes, bit: int) -> bytes:
        return area[self.offsets[bit] : self.offsets[bit] + SIZES[bit]]


CRIUS = 0x2E7
SAPPHIRE_RAPIDS = Processor(
    "Sapphire Rapids",
    0x602E7,
    11008,
    {2: 576, 5: 1088, 6: 1152, 7: 1664, 9: 2688, 17: 2752, 18: 2816},
)
ICE_LAKE = Processor("Ice Lake", 0x2E7, 2696, {2: 576, 5: 1088, 6: 1152, 7: 1664, 9: 2688})
# GENOA_GUEST was read on such a machine; GENOA and MILAN follow from AMD's leaving no gaps.
GENOA = Processor("Genoa", 0x2E7, 2440, {2: 576, 5: 832, 6: 896, 7: 1408, 9: 2432})
GENOA_GUEST = Processor("Genoa without protection keys", 0xE7, 2432, {2: 576, 5: 832, 6: 896, 7: 1408})
MILAN = Processor("Milan", 0x207, 840, {2: 576, 9: 832})
ALL = [SAPPHIRE_RAPIDS, ICE_LAKE, GENOA, GENOA_GUEST, MILAN]
each = pytest.mark.parametrize("processor", ALL, ids=lambda processor: processor.name)


def _content(bit: int) -> bytes:
    return bytes((bit * 16 + at) % 251 + 1 for at in range(SIZES[bit]))


def _written(area: bytes) -> tuple[pb.user_x86_fpregs_entry, own.ThreadExtra]:
    entry, extra = pb.user_x86_fpregs_entry(), own.ThreadExtra()
    xsave.to_entry(area, entry, extra)
    return entry, extra


@each
def test_a_component_is_in_the_field_of_its_name(processor: Processor) -> None:
    entry, extra = _written(processor.area())
    for bit in processor.known():
        values = getattr(entry.xsave, FIELDS[bit])
        assert struct.pack(f"<{len(values)}{WORDS[bit]}", *values) == _content(bit)
    assert xsave.from_entry(entry, extra, "core-1.img") == processor.area()


@each
def test_crius_fields_go_where_the_processor_has_them(processor: Processor) -> None:
    entry, _ = _written(processor.area())
    area = xsave.relaid(xsave.from_entry(entry, None, "core-1.img"), processor.offsets)
    assert {bit: processor.content(area, bit) for bit in processor.known()} == {
        bit: _content(bit) for bit in processor.known()
    }
    assert area[:416] == processor.area()[:416]
    assert area[512:576] == processor.area()[512:576]


@each
@pytest.mark.parametrize("other", ALL, ids=lambda other: other.name)
def test_the_area_of_one_processor_fits_another(processor: Processor, other: Processor) -> None:
    area = xsave.relaid(processor.area(), other.offsets)
    for bit in set(processor.known()) & set(other.known()):
        assert other.content(area, bit) == _content(bit)


@each
def test_an_area_stays_as_it_is_at_home(processor: Processor) -> None:
    assert xsave.relaid(processor.area(), processor.offsets) == processor.area()


def test_what_criu_dumped_on_a_processor_without_xsave_is_in_use() -> None:
    """A component that is not marked as used is zeros to the kernel, whatever is in the area."""
    entry, _ = _written(ALL[0].area())
    entry.ClearField("xsave")
    area = xsave.from_entry(entry, None, "core-1.img")
    assert area[:416] == ALL[0].area()[:416]
    assert int.from_bytes(area[512:520], "little") == 0b11
