"""Compressed pages: where the blocks of a pages image lie, in CRIU's development branch. Pure.

A pagemap entry may say that its pages lie in blocks of several pages: each zeros, as it is, or an LZ4 block
(images/pagemap.proto there; in two layouts, see proto/process.proto).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lazyproc.images.files import ImageReader
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.model import PAGE

PE_PAYLOAD_ALIGNED = 8  # flag: the bytes of an entry begin at the next whole page
_MAX_BLOCK = 1024  # pages


class Packed(NamedTuple):
    """The bytes of one entry in the pages image: from `offset` on, `sizes` bytes for each `pages` pages, the last of
    which may be fewer. In all `held` pages.
    """

    offset: int
    held: int
    pages: int
    sizes: Sequence[int]

    @property
    def end(self) -> int:
        return self.offset + sum(self.sizes)


class Layout(NamedTuple):
    """What an entry says of its blocks; nothing: the pages as they are."""

    pages: int = 1
    sizes: Sequence[int] = ()
    total: int = 0


def layout_of(message: pb.pagemap_entry | pb.pagemap_entry_2895) -> Layout:
    if isinstance(message, pb.pagemap_entry_2895):
        return Layout(message.region_pages or 1, message.compressed_size, message.total_compressed_size)
    if message.HasField("blocks"):
        blocks = message.blocks
        return Layout(blocks.pages_per_block, blocks.block_sizes, blocks.total_payload_size)
    return Layout()


def pack(layout: Layout, count: int, at: int, *, aligned: bool, reader: ImageReader) -> Packed:
    """An entry of `count` pages behind the first `at` bytes of the pages image. Raises ImageError."""
    offset = -(-at // PAGE) * PAGE if aligned else at
    if not layout.sizes:
        if layout.total:
            raise reader.error("the sizes of compressed blocks are missing")
        return Packed(offset, count, count, (count * PAGE,))
    pages, sizes = layout.pages, layout.sizes
    if not 0 < pages <= _MAX_BLOCK or len(sizes) != -(-count // pages) or sum(sizes) != layout.total:
        raise reader.error(f"{len(sizes)} compressed blocks of {pages} pages for {count} pages")
    last = (count - 1) % pages + 1
    if max(sizes) > pages * PAGE or sizes[-1] > last * PAGE:
        raise reader.error("a compressed block is larger than its pages")
    return Packed(offset, count, pages, sizes)
