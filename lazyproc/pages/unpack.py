"""Compressed pages images, as CRIU's development branch writes them, made plain beside their folder.

Everything that serves pages reads them from a file by their offset, from C and without the GIL, and a process that is
restored lazily wants them one by one and not a block at a time. So they are decompressed once, into a file without a
name. liblz4, which apt and systemd bring along, does it.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

from lazyproc.errors import HostLacks, ImageError
from lazyproc.images.files import Folder
from lazyproc.images.packed import Packed
from lazyproc.model import PAGE

_BUFFER = 1 << 20  # bytes


def unpacked(folder: Folder, name: str, fd: int, entries: Iterable[Packed]) -> int:
    """A descriptor of a file with the pages of the image `name` (`fd`) one after the other.

    It lies in the folder, or where that cannot be written in the directory for temporary files ($TMPDIR). Raises
    ImageError for blocks that are garbled and for a disk that is full, HostLacks without liblz4.
    """
    try:
        with _nameless(folder) as out, open(os.dup(fd), "rb", _BUFFER) as packed:
            size = 0
            for data in _blocks(packed, entries, str(folder.path / name)):
                if isinstance(data, int):
                    out.seek(data, os.SEEK_CUR)
                    size += data
                else:
                    size += out.write(data)
            out.truncate(size)
            return os.dup(out.fileno())
    except OSError as error:
        raise Folder.failed(error, folder.path) from None


def _nameless(folder: Folder) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(dir=folder.path, buffering=_BUFFER)
    except OSError:
        return tempfile.TemporaryFile(buffering=_BUFFER)


def _blocks(packed: IO[bytes], entries: Iterable[Packed], where: str) -> Iterator[memoryview | bytes | int]:
    """The content of each block; of zeros how many bytes they are."""
    decompress = _decompressor(where)
    for entry in entries:
        packed.seek(entry.offset)
        left = entry.held
        for size in entry.sizes:
            full = min(entry.pages, left) * PAGE
            left -= entry.pages
            if not size:
                yield full
                continue
            data = packed.read(size)
            if len(data) != size:
                raise ImageError("was cut short", where=where, remedy="copy the folder again")
            yield data if size == full else decompress(data, full)


def _decompressor(where: str) -> Any:
    try:
        lz4 = ctypes.CDLL("liblz4.so.1")
    except OSError:
        raise HostLacks(
            "compressed pages need liblz4.so.1, which is missing",
            where=where,
            remedy="install the package liblz4-1",
        ) from None
    room = ctypes.create_string_buffer(1024 * PAGE)

    def decompress(data: bytes, full: int) -> memoryview:
        if lz4.LZ4_decompress_safe(data, room, len(data), full) != full:
            raise ImageError(
                "a compressed block is garbled", where=where, remedy="dump it again, or copy the folder again"
            )
        return memoryview(room)[:full]

    return decompress
