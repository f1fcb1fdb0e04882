"""The GNU build id of an ELF file: the linker's hash of its contents."""

from __future__ import annotations

import mmap
import struct

PT_NOTE = 4
NT_GNU_BUILD_ID = 3


def build_id(data: bytes | mmap.mmap) -> bytes:
    """The build id of a 64-bit little-endian ELF file, b"" when it has none or is no such file (elf(5)).

    `data` is the file, or as much of its beginning as holds the notes. Garbled files give b"" as well: the
    kernel maps what it is told, so a broken note is no reason to refuse the mapping.
    """
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64:
        return b""
    (program_headers,) = struct.unpack_from("<Q", data, 32)
    entry_size, count = struct.unpack_from("<HH", data, 54)
    for at in range(program_headers, program_headers + entry_size * count, max(entry_size, 1)):
        if at + 56 > len(data):
            return b""
        kind, _flags, offset, _vaddr, _paddr, size, _memsize, align = struct.unpack_from(
            "<IIQQQQQQ", data, at
        )
        if kind == PT_NOTE and (found := _note(data[offset : offset + size], 8 if align == 8 else 4)):
            return found
    return b""


def _note(notes: bytes, align: int) -> bytes:
    at = 0
    while at + 12 <= len(notes):
        name_size, desc_size, kind = struct.unpack_from("<III", notes, at)
        desc = _aligned(at + 12 + name_size, align)
        if kind == NT_GNU_BUILD_ID and notes[at + 12 : at + 12 + name_size] == b"GNU\0":
            return notes[desc : desc + desc_size]
        at = _aligned(desc + desc_size, align)
    return b""


def _aligned(number: int, align: int) -> int:
    return -(-number // align) * align
